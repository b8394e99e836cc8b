"""The state of the engines at one moment, in host memory: copied while training waits, written while it goes on."""

import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """Files that are still to be written, with copies of the tensors in them.

    It stands in for DeepSpeed's checkpoint engine while that saves (the methods under "DeepSpeed"). A tensor that
    occurs several times (tied weights, the export) is copied once. copies: False holds the live tensors instead, for a
    caller who writes before anything changes them.
    """

    def __init__(self, *, copies: bool = True) -> None:
        self._copies = copies
        self._files: deque[tuple[Path, Any]] = deque()
        self._known: dict[object, tuple[Tensor, Tensor]] = {}  # the original is held, so that its address stays taken

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor as it is now, on the host; the same object for the same memory."""
        tensor = tensor.detach()
        if not self._copies:
            return tensor
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in self._known:
            self._known[key] = (tensor, tensor.to("cpu", copy=True))
        return self._known[key][1]

    def add(self, path: Path, content: Any) -> None:
        """A file for `torch.save`, with the tensors of `content` as they are now."""
        self._files.append((path, self._copied(content)))

    def seal(self) -> "HostCopies":
        """Let go of the originals: all copies are made."""
        self._known.clear()
        return self

    def write(self) -> None:
        """Write all files to the disk and forget them. Raises OSError, or RuntimeError (torch's) when it refuses."""
        while self._files:
            path, content = self._files.popleft()
            torch.save(content, path)  # by its path: through a Python file it takes twice as long
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _copied(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.copy(item)
        if isinstance(item, dict):
            return {key: self._copied(value) for key, value in item.items()}
        if type(item) in (list, tuple):
            return type(item)(self._copied(value) for value in item)
        return item

    # DeepSpeed

    def create(self, info: object) -> None:
        """A checkpoint begins."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - DeepSpeed's signature
        """Make a folder, now."""
        os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Take what DeepSpeed wants written."""
        self.add(Path(path), state_dict)

    def commit(self, info: object) -> bool:
        """All is taken."""
        return True

    def is_decoupled(self) -> bool:
        """Whether DeepSpeed shall wait for a writer of its own."""
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether this rank writes what all have."""
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        """Whether DeepSpeed shall clone slices of large buffers before it saves them: they are copied here."""
        return not self._copies
