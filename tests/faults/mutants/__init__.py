"""Mutants: the package with one guarantee broken, each of which a bar has to notice.

A module holds its docstring, which says what is broken; BAR, such as "r10", or another word that
`pytest -k` understands; TESTS, if they are elsewhere than in tests/; TIER, "nightly" if the bar has
no short form; IS_QUICK, if CI tries it, not only `make nightly`; and `apply(root)`, which changes
the copy of a checkout in that folder.
"""

from pathlib import Path


def replace(root: Path, path: str, old: str, new: str) -> None:
    """Replace `old`, which must be there once, in one file of a copy of the checkout."""
    file = root / path
    text = file.read_text()
    assert text.count(old) == 1, f"{path} does not hold once: {old}"
    file.write_text(text.replace(old, new))
