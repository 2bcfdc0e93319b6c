"""Reading, checking and generating annotations; vocabularies and word vectors. No host."""
