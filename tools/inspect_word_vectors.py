r"""Look at a table of word vectors: the nearest words of some words, and its spectrum.

Examples:
    python tools/inspect_word_vectors.py words.safetensors --words dog "fire truck"
    python tools/inspect_word_vectors.py words.safetensors --words dog --count 20 \
        --plot spectrum.png
"""

import argparse
from pathlib import Path

from maskx.core.command_line import ended_in_one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("table", type=Path, help="file of tools/learn_word_vectors.py")
    add("--words", nargs="+", default=[], help="words whose neighbours to print")
    add("--count", type=int, default=10, help="neighbours of each (default: %(default)s)")
    add("--plot", type=Path, help="PNG file for the spectrum (needs matplotlib)")
    return parser.parse_args()


def main() -> None:
    """Print what is known; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    with ended_in_one_line():
        from maskx.core.word_table import load_word_table
        from maskx.systems.concept_mask.tag_vectors import (
            format_neighbours,
            format_spectrum,
            plot_spectrum,
        )

        table = load_word_table(arguments.table)
        print(f"{len(table)} words, vectors of length {table.dim}, from: {table.source}\n")
        print(format_spectrum(table))
        if arguments.words:
            print(f"\n{format_neighbours(table, arguments.words, count=arguments.count)}")
        if arguments.plot:
            arguments.plot.parent.mkdir(parents=True, exist_ok=True)
            plot_spectrum(arguments.plot, table)


if __name__ == "__main__":
    main()
