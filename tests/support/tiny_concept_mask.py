"""Settings of ConceptMask for tests: three steps of tiny networks."""

import dataclasses

from maskx.systems.concept_mask.pipeline import QUICK

TINY = dataclasses.replace(
    QUICK,
    network=dataclasses.replace(
        QUICK.network,
        image_size=64,
        embedding_size=32,
        attention_sizes=(32, 64),
        hidden_channels=(16, 16),
        refinement_channels=16,
        encoder_widths=(4, 6, 8, 8),
        decoder_channels=(8, 8, 8, 8, 4),
    ),
    embedding_iterations=3,
    refinement_iterations=3,
    segmentation_iterations=3,
    batch_size=4,
)
