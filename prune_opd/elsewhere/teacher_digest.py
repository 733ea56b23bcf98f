"""What a teacher is, in 32 hex digits: every byte of its weights, its config.json, and its number format."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prune_opd.errors import ConfigError
from prune_opd.process import tell

PIECE = 256 * 2**20  # bytes that are summed by themselves: ranks share the pieces of all files
MARK = b"prune-opd teacher 1"


def teacher_digest(directory: str | Path, how: str = "") -> str:
    """Digest of a model directory and of `how` it is computed (number formats). Collective where there are ranks.

    Every rank reads its share of the weight files. The digest does not depend on their names or on the number of
    ranks, but on where one file ends. Raises `ConfigError` where there are none.
    """
    folder, paths = Path(directory), sorted(Path(directory).glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{directory} has no .safetensors files, so nobody can say which weights they are")
    pieces = [(path, first) for path in paths for first in range(0, max(path.stat().st_size, 1), PIECE)]
    tell(f"checksum of {folder}, {len(pieces)} pieces")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    everyone: list[Any] = [{number: _digest(*pieces[number]) for number in range(rank, len(pieces), ranks)}]
    if ranks > 1:
        (mine,), everyone = everyone, [None] * ranks
        dist.all_gather_object(everyone, mine)
    whole = {number: digest for of_rank in everyone for number, digest in of_rank.items()}
    digest = hashlib.blake2b(MARK, digest_size=16)
    digest.update(how.encode())
    digest.update((folder / "config.json").read_bytes())
    for number, (_, first) in enumerate(pieces):
        digest.update(first.to_bytes(8, "little") + whole[number])
    return digest.hexdigest()


def served_name(directory: str | Path) -> str:
    """The name under which a server of this directory says whose weights it has: NAME-DIGEST."""
    return f"{Path(directory).resolve().name}-{teacher_digest(directory)[:16]}"


def _digest(path: Path, first: int) -> bytes:
    digest, left = hashlib.blake2b(digest_size=32), PIECE
    with path.open("rb") as file:
        file.seek(first)
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return digest.digest()
