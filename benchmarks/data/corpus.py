"""A corpus: tokens of 16 bits on disk, made of files of text, and packed to travel."""

import dataclasses
import hashlib
import io
import json
import lzma
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.data.files import text_files
from benchmarks.models.smollm import smollm_tokenizer

BYTES = 256  # A vocabulary of this size is of bytes, and takes no package.
SMOLLM = 49152  # The vocabulary of SmolLM2.
END = 0  # The token between two files.
HELD_OUT = 0.01  # The fraction of files.
SAMPLE = 2**25  # Bytes that a vocabulary is made from.
SPLITS = ("train", "held-out")
FACTS, TOKENIZER = "corpus.json", "tokenizer.json"
TOKENS = np.dtype("<u2")
Encode = Callable[[Sequence[bytes]], Iterable[np.typing.ArrayLike]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens of files in a random order, the same on every machine.

    Attributes:
      train: uint16, files one after the other, with ``END`` after each.
      held_out: the same, of other files.
      facts: what tells it from another, for records: its name, the size of the
        vocabulary, the tokens of each part, the bytes of text in a token that is held
        out, and a hash of all tokens.
    """

    train: np.ndarray
    held_out: np.ndarray
    facts: dict[str, Any]


def read_corpus(folder: Path, vocabulary: int) -> Corpus:
    """Returns a corpus, mapped into memory.

    Args:
      folder: of the text, as the command ``corpus`` makes it.
      vocabulary: its size.

    Raises:
      FileNotFoundError: if it is not there; the message has the command.
      ValueError: if a file is damaged.
    """
    place = folder / str(vocabulary)
    if not (place / FACTS).is_file():
        raise FileNotFoundError(
            f"{place} has no corpus; make it by `python -m benchmarks corpus --text "
            f"{folder.name} --out {folder.parent} --vocabulary {vocabulary}`, or from "
            "a pack by `python -m benchmarks corpus --text PACK.tar`."
        )
    facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
    maps = {}
    for split in SPLITS:
        path, count = place / f"{split}.u16", facts[split]
        if not path.is_file() or path.stat().st_size != 2 * count:
            raise ValueError(
                f"{path} should have {count} tokens of two bytes, but is cut short or "
                "damaged; remove its folder, and make the corpus again."
            )
        maps[split] = np.memmap(path, TOKENS, "r")
    return Corpus(maps["train"], maps["held-out"], facts)


def language_reference() -> Corpus:
    """Returns Python's language reference, which ``help("for")`` reads, for SmolLM2.

    Every eighth of its topics is held out.
    """
    encode, _ = _smollm([], SMOLLM)
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for i, name in enumerate(sorted(topics)):
        parts[SPLITS[i % 8 == 0]].append(topics[name].encode())
    tokens = {
        split: np.concatenate([*_encoded(texts, encode)])
        for split, texts in parts.items()
    }
    facts = {"name": "Python's language reference", "vocabulary": SMOLLM}
    facts |= {split: len(x) for split, x in tokens.items()}
    facts["sha256"] = _sha256(*tokens.values())
    return Corpus(tokens["train"], tokens["held-out"], facts)


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def corpus(
    text: str = "linux-source-6.1",
    out: Path = Path("build/corpus"),
    *,
    vocabulary: tuple[int, ...] = (1024, 8192),
    megabytes: float | None = None,
) -> None:
    """Make a corpus of tokens from a package of Debian, a folder, or a pack.

    Files come in the order of a hash of their path, which also chooses every hundredth
    to be held out. The kernel's sources are 860 MB of text, without long tables.

    Args:
        text: linux-source-6.1, or linux-doc-6.1 for prose: packages that apt-get
            downloads, with ``=`` and a version for another than the newest; a .deb, a
            tar archive or a folder; or a pack.
        out: Folder for a folder of this text, with one for each vocabulary.
        vocabulary: Sizes of vocabularies: 256 for bytes, 49152 for that of SmolLM2, to
            train it further; others are of byte pairs that are frequent here, by the
            package tokenizers (``pip install '.[corpus]'``). A pack has its own.
        megabytes: Text to take, the first files; None for all.
    """
    if Path(text).is_file() and tarfile.is_tarfile(text):
        with tarfile.open(text) as archive:
            if FACTS in archive.getnames():
                _unpack(archive, out)
                return
    if set(vocabulary) - {BYTES}:
        _tokenizers()  # Missing, it is missed before the work.
    texts = _ordered(text, np.inf if megabytes is None else 1e6 * megabytes)
    for size in vocabulary:
        make = {BYTES: _bytes, SMOLLM: _smollm}.get(size, _byte_pairs)
        encode, kept = make(texts["train"], size)
        tokens = {split: _encoded(texts[split], encode) for split in SPLITS}
        facts = {"name": _name(text), "vocabulary": size}
        facts["held-out bytes"] = sum(map(len, texts["held-out"]))
        _write(out, facts, tokens, kept)


def pack(
    folder: Path = Path("build/corpus/linux-source-6.1"),
    out: Path = Path("build/corpus/pack.tar"),
    *,
    vocabulary: int = 8192,
    mebibytes: float = 48.0,
) -> None:
    """Pack the first part of a corpus for a machine without a network, by xz.

    What is held out travels whole. The command corpus takes the pack as its text.

    Args:
        folder: Of a text, as the command corpus made it.
        out: The file to write.
        vocabulary: Which of its vocabularies.
        mebibytes: Of the file, at most.
    """
    data = read_corpus(folder, vocabulary)
    tokenizer = folder / str(vocabulary) / TOKENIZER
    members = {TOKENIZER: tokenizer.read_bytes()} if tokenizer.is_file() else {}
    members["held-out.xz"], _ = _compressed(data.held_out, np.inf)
    room = 2**20 * mebibytes - sum(map(len, members.values())) - 2**14
    members["train.xz"], count = _compressed(data.train, room)
    if not count:
        raise ValueError(
            f"mebibytes is {mebibytes}, which leaves no room for tokens to train on; "
            "pass one more at least."
        )
    facts = data.facts | {"train": count}
    facts["sha256"] = _sha256(data.train[:count], data.held_out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w") as archive:
        for name, content in ({FACTS: json.dumps(facts).encode()} | members).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, {facts}")


def _name(text: str) -> str:
    """Returns the name of a folder, or of a package without its version."""
    name = Path(text).absolute().name
    if name.endswith(".deb"):
        return name.partition("_")[0]
    return name if Path(text).exists() else name.partition("=")[0]


def _ordered(text: str, most: float) -> dict[str, list[bytes]]:
    """Returns the files of a text by split, in the order of a hash of their path."""
    found = {}
    for path, content in tqdm(text_files(text), desc=text, unit="file"):
        digest = hashlib.sha256(path.encode()).hexdigest()
        found[digest] = content
    texts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    seen = set()
    for digest, content in sorted(found.items()):
        if content in seen or most <= 0:
            continue
        seen.add(content)
        most -= len(content)
        # The order is by the first digits, and the choice by the last ones.
        held_out = int(digest[-8:], 16) < HELD_OUT * 16**8
        texts[SPLITS[held_out]].append(content)
    if not all(texts.values()):
        count = sum(map(len, texts.values()))
        raise ValueError(
            f"text has {count} files of text, too few for {HELD_OUT:.0%} of them to be "
            "held out; pass a folder of more, hundreds at least."
        )
    return texts


def _bytes(texts: Sequence[bytes], size: int) -> tuple[Encode, None]:
    del texts, size
    return lambda texts: [np.frombuffer(text, np.uint8) for text in texts], None


def _smollm(texts: Sequence[bytes], size: int) -> tuple[Encode, None]:
    del texts, size
    encode = smollm_tokenizer()
    return lambda texts: [encode(text.decode()) for text in texts], None


def _byte_pairs(texts: Sequence[bytes], size: int) -> tuple[Encode, bytes]:
    """Returns what encodes texts in byte pairs that are frequent in them, and how."""
    tokenizers = _tokenizers()
    if not BYTES < size <= 2**16:
        raise ValueError(
            f"vocabulary must be of {BYTES}, for bytes, to {2**16} tokens, got {size}."
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<end>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)

    def encode(texts: Sequence[bytes]) -> list[list[int]]:
        coded = tokenizer.encode_batch_fast([text.decode() for text in texts])
        return [one.ids for one in coded]

    return encode, tokenizer.to_str().encode()


def _sample(texts: Sequence[bytes]) -> Iterator[str]:
    room = SAMPLE
    for text in texts:
        if room > 0:
            yield text.decode()
        room -= len(text)


def _tokenizers() -> Any:
    try:
        import tokenizers  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ImportError(
            "a vocabulary of byte pairs takes the package tokenizers; `pip install "
            f"'.[corpus]'`, or pass --vocabulary {BYTES} for bytes."
        ) from error
    return tokenizers


def _encoded(texts: Sequence[bytes], encode: Encode) -> Iterator[np.ndarray]:
    for i in tqdm(range(0, len(texts), 256), unit="256 files"):
        for tokens in encode(texts[i : i + 256]):
            yield np.append(np.asarray(tokens, TOKENS), TOKENS.type(END))


def _unpack(archive: tarfile.TarFile, out: Path) -> None:
    members = {}
    for member in archive:
        file = archive.extractfile(member)
        assert file is not None
        members[member.name] = file.read()
    facts = json.loads(members[FACTS])
    tokens = {
        split: [np.frombuffer(lzma.decompress(members[f"{split}.xz"]), TOKENS)]
        for split in SPLITS
    }
    if _sha256(*(parts[0] for parts in tokens.values())) != facts["sha256"]:
        raise ValueError(
            f"{archive.name} is damaged: it holds other tokens than it says; pack it "
            "again."
        )
    _write(out, facts, tokens, members.get(TOKENIZER))


def _write(
    out: Path,
    facts: dict[str, Any],
    tokens: Mapping[str, Iterable[np.ndarray]],
    tokenizer: bytes | None,
) -> None:
    """Writes a corpus to a folder that is there only when it is whole."""
    place = out / facts["name"] / str(facts["vocabulary"])
    made = place.with_name(f"{place.name}.part")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    if tokenizer is not None:
        (made / TOKENIZER).write_bytes(tokenizer)
    for split, parts in tokens.items():
        with (made / f"{split}.u16").open("wb") as file:
            for part in parts:
                file.write(part.tobytes())
            facts = facts | {split: file.tell() // 2}
    maps = (np.memmap(made / f"{split}.u16", TOKENS, "r") for split in SPLITS)
    facts["sha256"] = _sha256(*maps)
    (made / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    made.rename(place)
    print(f"{place}: {facts}")


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _compressed(tokens: np.ndarray, room: float) -> tuple[bytes, int]:
    """Returns as many of the first tokens as fit, compressed, and their number."""
    part, held_back = (
        2**16,
        2**17,
    )  # Tokens at a time; bytes in the compressor, at most.
    compressor = lzma.LZMACompressor(preset=6)
    parts, used, count = [], 0, 0
    while count < len(tokens) and used + held_back + 2 * part < room:
        parts.append(compressor.compress(tokens[count : count + part].tobytes()))
        used += len(parts[-1])
        count = min(count + part, len(tokens))
    return b"".join([*parts, compressor.flush()]), count
