"""The module image: a deterministic archive of the TDX module's own sources, and how it is executed.

What the loader measures is what runs: the sources are compiled from the bytes that lie in SEAMRR, not from the files
that the package was installed with. MRSEAM is the SHA-384 of the image, so the same sources give the same MRSEAM on
every machine.
"""

import hashlib
import importlib
import io
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from threading import Lock
from types import CodeType, ModuleType
from typing import Protocol

from softtdx.errors import SoftTdxError
from softtdx.hw.isa import SeamCpu, SeamSoftware

__all__ = ["PAGE", "ImageError", "ModuleFactory", "build_image", "load_image"]

PAGE = 4096
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that the archive format can hold
_LOADED: dict[bytes, "ModuleFactory"] = {}  # by SHA-384: the same bytes compile to the same code
_LOADING = Lock()


class ImageError(SoftTdxError):
    """Bytes that are no module image."""


class ModuleFactory(Protocol):
    """What an image must export as `TdxModule`: makes the SEAM software from the loader's SYS_INFO_TABLE."""

    def __call__(self, cpu: SeamCpu, sysinfo: bytes) -> SeamSoftware:
        """Start the module on the processor that installs it; `sysinfo` is SYS_INFO_TABLE, 4096 bytes."""
        ...


def build_image(package: Path) -> bytes:
    """Archive the sources below `package` (a folder with an __init__.py), padded to whole pages.

    Names, order, dates and attributes are fixed, nothing is compressed: equal sources give equal bytes.
    Raises ImageError when there are no sources.
    """
    sources = sorted(p for p in package.rglob("*.py") if "__pycache__" not in p.parts)
    if not (package / "__init__.py").is_file():
        raise ImageError(f"{str(package)!r} holds no TDX module: it has no __init__.py")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sources:
            entry = zipfile.ZipInfo(path.relative_to(package).as_posix(), _EPOCH)
            entry.create_system = 3
            entry.external_attr = 0o444 << 16
            archive.writestr(entry, path.read_bytes())
        # The comment pads the archive to whole pages, and so stays inside what is measured.
        end = buffer.tell() + sum(46 + len(p.relative_to(package).as_posix().encode()) for p in sources) + 22
        archive.comment = bytes(-end % PAGE)
    image = buffer.getvalue()
    if len(image) % PAGE:
        raise ImageError(f"the archive has {len(image)} bytes, which is not a whole number of pages")
    return image


def load_image(image: bytes) -> ModuleFactory:
    """Compile and execute `image`, which the caller has verified, as a package of its own; returns its TdxModule.

    Raises ImageError when the bytes are no archive or export no TdxModule.
    """
    digest = hashlib.sha384(image).digest()
    with _LOADING:
        factory = _LOADED.get(digest)
        if factory is None:
            factory = _LOADED[digest] = _execute(image, f"softtdx_module_{digest.hex()[:16]}")
    return factory


def _execute(image: bytes, name: str) -> ModuleFactory:
    finder = _ImageFinder(name, _sources(image))
    sys.meta_path.append(finder)
    try:
        package = importlib.import_module(name)
        factory: ModuleFactory = package.TdxModule
    except (ImportError, SyntaxError, AttributeError) as error:
        sys.meta_path.remove(finder)
        for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            del sys.modules[loaded]
        raise ImageError(f"the module image does not start: {error}") from error
    return factory


def _sources(image: bytes) -> dict[str, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(image)) as archive:
            return {entry.filename: archive.read(entry).decode() for entry in archive.infolist()}
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ImageError(f"the module image is no archive: {error}") from error


class _ImageFinder(MetaPathFinder, InspectLoader):
    """Finds and executes the modules of one image under its package name."""

    def __init__(self, package: str, sources: dict[str, str]) -> None:
        self._package = package
        self._files = dict(_named(package, sources))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname not in self._files:
            return None
        file, _, is_package = self._files[fullname]
        spec = ModuleSpec(fullname, self, origin=file, is_package=is_package)
        spec.has_location = True
        return spec

    def is_package(self, fullname: str) -> bool:
        return self._files[fullname][2]

    def get_source(self, fullname: str) -> str:
        """The source text; tracebacks read their lines here."""
        return self._files[fullname][1]

    def get_code(self, fullname: str) -> CodeType:
        file, source, _ = self._files[fullname]
        code: CodeType = compile(source, file, "exec", dont_inherit=True)
        return code


def _named(package: str, sources: dict[str, str]) -> Iterator[tuple[str, tuple[str, str, bool]]]:
    for file, source in sources.items():
        parts = file.removesuffix(".py").split("/")
        is_package = parts[-1] == "__init__"
        name = ".".join([package, *(parts[:-1] if is_package else parts)])
        yield name, (f"<{package}>/{file}", source, is_package)
