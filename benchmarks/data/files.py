"""Files of text by their paths: of a Debian package, an archive, or a folder."""

import gzip
import lzma
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

# What is longer is a table that a program wrote: a third of the sources of Linux.
LONGEST = 2**18
# Pages made from texts that are there, too.
MADE = (".css", ".html", ".js", ".svg")


def text_files(source: str) -> Iterator[tuple[str, bytes]]:
    """Yields the path and the content of each file of text, in no order.

    A file within that is a gzipped file or an xz archive counts as what it holds. What
    is not UTF-8, is empty, longer than ``LONGEST``, or made for a browser is left out.

    Args:
      source: a folder, a tar archive, a Debian package, or the name of one, such as
        "linux-source-6.1" or "linux-source-6.1=6.1.192-3", which ``apt-get``
        downloads; nothing is installed.

    Raises:
      FileNotFoundError: if there is no such folder, file or package.
    """
    path = Path(source)
    if path.is_dir():
        files = (
            (file.relative_to(path).as_posix(), file.read_bytes())
            for file in path.rglob("*")
            if file.is_file() and file.stat().st_size <= LONGEST
        )
    elif path.is_file():
        files = _archived(path)
    else:
        files = _package(source)
    for name, content in files:
        if 0 < len(content) <= LONGEST and _is_text(name, content):
            yield name, content


def _is_text(name: str, content: bytes) -> bool:
    if PurePosixPath(name).suffix in MADE or b"\0" in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _package(name: str) -> Iterator[tuple[str, bytes]]:
    if shutil.which("apt-get") is None:
        raise FileNotFoundError(_missing(name, "there is no apt-get to download it"))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["apt-get", "-o", "APT::Sandbox::User=root", "download", name],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        found = list(Path(folder).glob("*.deb"))
        if done.returncode or not found:
            why = done.stderr.strip().rpartition("\n")[-1]
            raise FileNotFoundError(_missing(name, f"apt-get says {why!r}"))
        yield from _archived(found[0])


def _missing(name: str, why: str) -> str:
    return (
        f"text is {name!r}, which is no folder, no archive, and no package of Debian "
        f"({why}); run `apt-get update` first, or pass a folder of texts, or a pack "
        "made by `python -m benchmarks pack`."
    )


def _archived(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields what is in a tar archive or a package of Debian."""
    if path.suffix != ".deb":
        with path.open("rb") as file:
            yield from _members(file)
        return
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE
    ) as unpack:
        assert unpack.stdout is not None
        yield from _members(unpack.stdout)


def _members(stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if member.name.endswith(".tar.xz"):
                with lzma.open(file) as inner:
                    yield from _members(inner)
            elif member.name.endswith(".gz"):
                yield member.name.removesuffix(".gz"), gzip.decompress(file.read())
            elif member.size <= LONGEST:
                yield member.name, file.read()
