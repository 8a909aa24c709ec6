"""Placement of stored features: in GPU memory as long as they fit, else in host memory, with prefetching."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from features.file import Draft


class DeviceMemory:
    """A GPU's memory: free bytes, allocation, upload. Tests replace it."""

    pinned = True

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def free(self) -> int:
        """Free bytes, including those that PyTorch has reserved but does not use."""
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + held

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the GPU. Raises torch.OutOfMemoryError."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def release(self) -> None:
        """Release memory that PyTorch has reserved but does not use."""
        torch.cuda.empty_cache()

    def upload(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Start an asynchronous copy of a pinned tensor; `ready` waits for it."""
        with torch.cuda.stream(self._stream):
            copy = host.to(self.device, non_blocking=True)
        return copy, self._stream.record_event()

    def ready(self, copy: Tensor, event: torch.cuda.Event) -> Tensor:
        """The copy, usable once it has arrived; the host does not wait."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        copy.record_stream(current)
        return copy


def fetch_ahead(source: Tensor, parts: tuple[Tensor, ...], memory: DeviceMemory) -> Iterator[Tensor]:
    """Yield `source[part]` on the device for each part; a thread gathers the next ones meanwhile.

    source: host memory, rows first, possibly a mapped file. Only three buffers are pinned: pinning everything takes
    long, and a mapped file cannot be pinned. The thread makes no CUDA call, so a graph may be captured meanwhile.
    """
    if not parts:
        return
    longest = max(len(part) for part in parts)
    buffers = [torch.empty((longest, *source.shape[1:]), dtype=source.dtype, pin_memory=memory.pinned) for _ in "abc"]
    copied: list[torch.cuda.Event | None] = [None] * len(buffers)

    def gather(number: int) -> Tensor:
        out = buffers[number % len(buffers)][: len(parts[number])]
        return torch.index_select(source, 0, parts[number], out=out)

    def begin(number: int) -> Future | None:
        if number >= len(parts):
            return None
        if (event := copied[number % len(buffers)]) is not None:
            event.synchronize()  # of three batches ago: finished, unless the device is far behind
        return pool.submit(gather, number)

    pool = ThreadPoolExecutor(1, thread_name_prefix="fetch-ahead")
    try:
        waiting = [begin(0), begin(1)]
        for number in range(len(parts)):
            copy, event = memory.upload(waiting.pop(0).result())
            copied[number % len(buffers)] = event
            waiting.append(begin(number + 2))
            yield memory.ready(copy, event)
    finally:
        pool.shutdown(cancel_futures=True)


class HostCopy:
    """Copies batches from a GPU to host memory while the next one is computed; on a CPU it just copies."""

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None
        self._staging: list[Tensor] = []
        self._pending: tuple[torch.cuda.Event, Tensor, Tensor] | None = None

    def put(self, features: Tensor, out: Tensor) -> None:
        """Copy `features` to `out`, which is complete after the next `put` or `finish`."""
        if not features.is_cuda:
            out.copy_(features)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(features.device)
            self._staging = [torch.empty(features.shape, dtype=out.dtype, pin_memory=True) for _ in range(2)]
        staging = self._staging[0][: len(features)]
        self._staging.reverse()
        self._stream.wait_stream(torch.cuda.current_stream(features.device))
        with torch.cuda.stream(self._stream):
            staging.copy_(features, non_blocking=True)
        features.record_stream(self._stream)
        event = self._stream.record_event()
        self.finish()
        self._pending = (event, staging, out)

    def finish(self) -> None:
        """Wait for the copy in progress."""
        if self._pending is not None:
            event, staging, out = self._pending
            event.synchronize()
            out.copy_(staging)
            self._pending = None


@dataclass
class Stored:
    """The features of one view: on a GPU, or in host memory (possibly a mapped file) if `device` is None.

    shared: `host` is a file that all processes of a run write to.
    """

    device: Tensor | None = None
    host: Tensor | None = None
    draft: Draft | None = None
    shared: bool = False

    def put(self, start: int, features: Tensor, host_copy: HostCopy) -> None:
        """Store a batch whose first row is `start`."""
        rows = slice(start, start + len(features))
        if self.device is not None:
            self.device[rows] = features
        if self.host is not None:
            host_copy.put(features, self.host[rows])
