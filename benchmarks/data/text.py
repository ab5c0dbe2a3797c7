"""Text as tokens: bytes of what comes with CPython or any file, words of WikiText-2."""

import dataclasses
import pydoc_data.topics
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.data import hub


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens of a text.

    Attributes:
      train: integers, in order.
      test: the same, held out.
      name: the text.
      vocabulary: number of different tokens.
      token: what a token is: "byte" or "word".
    """

    train: np.ndarray
    test: np.ndarray
    name: str
    vocabulary: int
    token: str


def text(source: str, folder: Path | None = None) -> Text:
    """Returns a text.

    Args:
      source: "pydoc", the help on Python that comes with CPython, some 450 kB;
        "stdlib", the sources of its modules, some 5 MB; the path of a file of text; or
        "wikitext-2", by words. Of all but the last, which are bytes, the last tenth is
        held out.
      folder: where WikiText-2 is, as wiki.train.tokens and wiki.test.tokens; None for
        Hugging Face.

    Raises:
      FileNotFoundError: if the text is nowhere to be had.
    """
    if source == "pydoc":
        return _pydoc()
    if source == "stdlib":
        return _stdlib()
    if source == "wikitext-2":
        return _words(*_wikitext(folder))
    if Path(source).is_file():
        return _bytes(Path(source).read_bytes(), Path(source).name)
    raise ValueError(
        f"the text must be 'pydoc', 'stdlib', 'wikitext-2' or a file, got {source!r}"
    )


def words(source: str, folder: Path | None = None, *, vocabulary: int) -> Text:
    """Returns a text of bytes by words: letters in a row, without case, or a mark.

    Args:
      source: as in ``text``.
      folder: as in ``text``.
      vocabulary: number of words, the most frequent first; the last one stands for all
        that are less frequent in the text to train on.
    """
    data = text(source, folder)
    if data.token != "byte":
        raise ValueError(f"the text must be of bytes to be split, got {source!r}")
    parts = [
        re.findall(r"\w+|[^\w\s]", part.tobytes().decode(errors="replace").lower())
        for part in (data.train, data.test)
    ]
    common = Counter(parts[0]).most_common(vocabulary - 1)
    numbers = {word: i for i, (word, _) in enumerate(common)}
    train, test = (
        np.array([numbers.get(word, vocabulary - 1) for word in part], np.int32)
        for part in parts
    )
    return Text(train, test, f"{data.name}, {vocabulary} words", vocabulary, "word")


def _pydoc() -> Text:
    # Sorted by name, as its order has changed between versions of Python.
    pages = [page for _, page in sorted(pydoc_data.topics.topics.items())]
    return _bytes("\n".join(pages).encode(), "pydoc")


def _stdlib() -> Text:
    # Single modules, no packages: a Linux distribution may leave out some of these.
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{name}.py" for name in sorted(sys.stdlib_module_names)]
    return _bytes(b"\n".join(f.read_bytes() for f in files if f.exists()), "stdlib")


def _bytes(content: bytes, name: str) -> Text:
    data = np.frombuffer(content, np.uint8)
    cut = 9 * len(data) // 10
    return Text(data[:cut], data[cut:], name, 256, "byte")


def _wikitext(folder: Path | None) -> list[list[str]]:
    """Returns the words to train on, and those held out."""
    if folder is None:
        loaded = hub.load(
            "Salesforce/wikitext",
            "wikitext-2-v1",
            what="WikiText-2",
            otherwise="pass a folder with wiki.train.tokens and wiki.test.tokens",
        )
        lines = [loaded[split]["text"] for split in ("train", "test")]
    else:
        lines = []
        for split in ("train", "test"):
            path = folder / f"wiki.{split}.tokens"
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing; point to the folder of WikiText-2, with "
                    "wiki.train.tokens and wiki.test.tokens."
                )
            lines.append(path.read_text(encoding="utf-8").splitlines())
    return [
        [word for line in part for word in [*line.split(), "<eos>"]] for part in lines
    ]


def _words(train: list[str], test: list[str]) -> Text:
    numbers = {word: i for i, word in enumerate(dict.fromkeys(train + test))}
    tokens = [np.array([numbers[w] for w in part], np.int32) for part in (train, test)]
    return Text(tokens[0], tokens[1], "wikitext-2", len(numbers), "word")
