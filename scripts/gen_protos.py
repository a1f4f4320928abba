"""Generate hacrl_exchange/_pb, the committed Python code of our protos.

All protos land flat in one package, so file names must be unique across proto/hacrl. protoc writes
imports for a top-level package `hacrl`, which we do not have; they are rewritten to relative ones.

    python scripts/gen_protos.py                      write hacrl_exchange/_pb
    python scripts/gen_protos.py --check              fail when what is committed is stale
    python scripts/gen_protos.py --descriptors FILE   write a descriptor set for buf instead
"""

import argparse
import importlib.metadata
import re
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
TARGET = ROOT / "hacrl_exchange" / "_pb"

# Another version writes code that demands another protobuf runtime (see pyproject.toml).
TOOLS = {"grpcio-tools": "1.80.0", "mypy-protobuf": "5.1.0"}

INIT = '"""Generated from proto/ by scripts/gen_protos.py. Do not edit; only the codec should import it."""\n'

_PACKAGE = r"hacrl\.(?:\w+\.)*v\d\w*"
_REWRITES = (
    # `from hacrl.exchange.v1 import pool_pb2 as x`, in code and stubs
    (re.compile(rf"^from {_PACKAGE} import ", re.MULTILINE), "from . import "),
    # the module name that the builder stores in each message class
    (re.compile(rf"(BuildTopDescriptorsAndMessages\(DESCRIPTOR, ')({_PACKAGE})\."), r"\1hacrl_exchange._pb."),
)


class GenerationError(Exception):
    """The code could not be generated; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the three forms of the module's docstring and return the exit status."""
    parser = argparse.ArgumentParser(description="Generate hacrl_exchange/_pb from proto/.")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--check", action="store_true", help="write nothing; fail when _pb is stale")
    forms.add_argument("--descriptors", type=Path, metavar="FILE", help="write a descriptor set for buf")
    options = parser.parse_args(argv)
    try:
        if options.descriptors is not None:
            _write_descriptors(options.descriptors)
            return 0
        fresh = generate()
    except GenerationError as error:
        print(f"gen_protos: {error}", file=sys.stderr)
        return 1
    stale = _differences(fresh, TARGET)
    if options.check:
        for name in stale:
            print(f"{TARGET.relative_to(ROOT)}/{name} is stale; run scripts/gen_protos.py", file=sys.stderr)
        return 1 if stale else 0
    _write(fresh, TARGET)
    print(f"{TARGET.relative_to(ROOT)}: {len(fresh)} files, {len(stale)} changed")
    return 0


def generate() -> dict[str, str]:
    """Return the text of every file that belongs in _pb, by file name.

    Raises:
        GenerationError: a generator of another version, two protos of one name, or a proto protoc rejects.
    """
    _require_tools()
    protos = _protos()
    with tempfile.TemporaryDirectory() as scratch:
        _protoc(
            f"--plugin=protoc-gen-mypy={_plugin('protoc-gen-mypy')}",
            f"--plugin=protoc-gen-mypy_grpc={_plugin('protoc-gen-mypy_grpc')}",
            f"--python_out={scratch}",
            f"--grpc_python_out={scratch}",
            f"--mypy_out=quiet:{scratch}",
            f"--mypy_grpc_out=quiet:{scratch}",
            *protos,
        )
        written = [path for path in Path(scratch).rglob("*") if path.suffix in {".py", ".pyi"}]
        files = {path.name: _flatten(path.read_text(encoding="utf-8")) for path in written}
    # A file without services still gets an empty pair of gRPC modules: leave those out.
    for proto in protos:
        if not re.search(r"^service ", (PROTO / proto).read_text(encoding="utf-8"), re.MULTILINE):
            for suffix in (".py", ".pyi"):
                files.pop(f"{Path(proto).stem}_pb2_grpc{suffix}", None)
    files["__init__.py"] = INIT
    return files


def _flatten(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if left := re.search(rf"^\s*(?:from|import) {_PACKAGE}.*$", text, re.MULTILINE):
        raise GenerationError(f"protoc wrote an import that this script does not rewrite: {left[0].strip()}")
    return text


def _protos() -> list[str]:
    paths = sorted(path.relative_to(PROTO).as_posix() for path in PROTO.rglob("*.proto"))
    if not paths:
        raise GenerationError(f"there is no .proto file under {PROTO}")
    names = [Path(path).name for path in paths]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise GenerationError(f"all protos share one Python package; rename one of each: {', '.join(twins)}")
    return paths


def _require_tools() -> None:
    for name, wanted in TOOLS.items():
        found = importlib.metadata.version(name)
        if found != wanted:
            raise GenerationError(f"{name} is {found}, not {wanted}; install the dev extra")


def _plugin(name: str) -> Path:
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise GenerationError(f"{path} is missing; install the dev extra")
    return path


def _protoc(*arguments: str) -> None:
    """Run protoc with our protos, protobuf's own and googleapis-common-protos on its path."""
    includes = [PROTO, Path(grpc_tools.__file__).parent / "_proto", Path(sysconfig.get_path("purelib"))]
    status = protoc.main(["protoc", *(f"-I{path}" for path in includes), *arguments])
    if status != 0:
        raise GenerationError(f"protoc ended with status {status}; its messages are above")


def _write_descriptors(path: Path) -> None:
    _protoc("--include_imports", "--include_source_info", f"--descriptor_set_out={path}", *_protos())


def _differences(fresh: dict[str, str], target: Path) -> list[str]:
    """Return the names whose text differs, is missing, or should not be there."""
    present = {path.name: path.read_text(encoding="utf-8") for path in target.glob("*.py*") if path.is_file()}
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def _write(fresh: dict[str, str], target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in _differences(fresh, target):
        if name in fresh:
            (target / name).write_text(fresh[name], encoding="utf-8")
        else:
            (target / name).unlink()


if __name__ == "__main__":
    sys.exit(main())
