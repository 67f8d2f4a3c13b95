"""One shard: activations in, objects and a commit record out.

Shapes: T positions, D = d_model. Rows that have the stored dtype and no codec are written as they are while a thread
checks them for NaN and measures them; nothing is published before that is done. Others are converted, measured and
checksummed a context at a time by a few threads while the calling thread writes the one before. Memory beyond the
caller's tensors is bounded by `LOOKAHEAD` + 2 contexts, and is a few MB where rows are written as they are.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.basics.errors import GranaryError
from shared.launch import commands
from shared.store.buffers import Buffer, bits_of, empty_to_write
from shared.store.format import layout
from shared.store.format.checksum import crc32c
from shared.store.format.dtypes import convert, scales_per_row, storage_type
from shared.store.format.integrity import check_array_object
from shared.store.format.layout import StorePlan
from shared.store.format.manifest import ShardRecord, seal
from shared.store.format.quantise import dequantise, quantise
from shared.store.format.shard import ArrayRecord, EncodedChunk, encode_chunks, encode_index
from shared.store.format.site_path import scale_path, site_path
from shared.store.io.base import ObjectIO
from shared.store.statistics import BLOCK_ROWS, NormFigures, RowStatistics

LOOKAHEAD = 3  # contexts being prepared ahead of the write
ENCODE_THREADS = 2


@dataclass(frozen=True, slots=True)
class PreparedContext:
    """One context of one hook, ready to be written."""

    chunks: list[EncodedChunk]
    scale_chunks: list[EncodedChunk]  # of int8 only
    statistics: RowStatistics
    buffer: torch.Tensor | None  # holds the chunks of a converted context; free again once they are written


@dataclass(slots=True)
class ObjectDraft:
    """An object while its chunks pass by."""

    key: str
    num_slots: int | None  # None: a plain chunk without an index
    sizes: list[int] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)

    def add(self, chunk: EncodedChunk) -> tuple[Buffer, Buffer]:
        self.sizes.append(chunk.num_bytes)
        self.crcs.append(chunk.crc)
        return chunk.parts()

    def index(self) -> bytes:
        return b"" if self.num_slots is None else encode_index(self.sizes, self.num_slots)

    def record(self) -> ArrayRecord:
        sizes = np.array(self.sizes, np.int64)
        return ArrayRecord(self.key, int(sizes.sum()) + len(self.index()), sizes, np.array(self.crcs, np.uint32))


class ShardWriter:
    """Writes shards of one plan."""

    def __init__(self, io: ObjectIO, plan: StorePlan) -> None:
        self.io = io
        self.plan = plan
        self.kind = storage_type(plan.dtype)
        self._spare: deque[torch.Tensor] = deque(maxlen=LOOKAHEAD + 1)
        self.pool = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="granary-encode")
        # One thread: numpy's short calls gain nothing from two, which would only take the interpreter from each other.
        self.measurer = ThreadPoolExecutor(1, thread_name_prefix="granary-measure")
        self.slots = plan.shard_contexts * plan.chunks_per_context

    def write(
        self, shard: int, first_context: int, mask: npt.NDArray[np.bool_], activations: dict[str, torch.Tensor]
    ) -> ShardRecord:
        """Write every hook's objects, then the commit record.

        `mask` is [n, T]; `activations[hook]` is [n, T, D] on the CPU, any float dtype. Raises GranaryError for tensors
        that don't fit the plan, NaN or infinity at a trainable position, a full disk, or a key that holds other bytes.
        """
        self._check_shapes(len(mask), activations)
        arrays: dict[str, ArrayRecord] = {}
        norms: dict[str, NormFigures] = {}

        def write_hook(hook: str) -> None:
            norms[hook] = self._write_hook(hook, shard, first_context, mask, activations[hook], arrays)

        with ThreadPoolExecutor(self.io.parallel_puts, thread_name_prefix="granary-put") as pool:
            list(pool.map(write_hook, self.plan.hooks))
        record = ShardRecord(
            shard=shard,
            first_context=first_context,
            plan_hash=self.plan.hash(),
            trainable=tuple(mask.sum(axis=1, dtype=np.int64).tolist()),
            arrays=arrays,
            norms=norms,
        )
        data = seal(record.to_json())
        key = layout.manifest_key(shard)
        if not self.io.put(key, [data]) and self.io.get(key) != data:
            raise GranaryError(
                f"shard {shard} of {self.io.url} was committed by another harvest with other values: "
                "two harvests must not write one store at once"
            )
        return replace(record, crc=crc32c(data))

    def _check_shapes(self, num_contexts: int, activations: dict[str, torch.Tensor]) -> None:
        if activations.keys() != self.plan.hooks.keys():
            raise GranaryError(
                f"the store holds hooks {', '.join(self.plan.hooks)}, but was given {', '.join(activations) or 'none'}"
            )
        for hook, tensor in activations.items():
            wanted = (num_contexts, self.plan.seq_len, self.plan.hooks[hook])
            if tuple(tensor.shape) != wanted:
                raise GranaryError(f"{hook}: activations have shape {tuple(tensor.shape)}, the shard needs {wanted}")
            if not tensor.is_floating_point() or tensor.device.type != "cpu":
                raise GranaryError(f"{hook}: activations must be float tensors on the CPU, not {tensor.dtype} there")

    def _write_hook(
        self,
        hook: str,
        shard: int,
        first_context: int,
        mask: npt.NDArray[np.bool_],
        tensor: torch.Tensor,
        arrays: dict[str, ArrayRecord],
    ) -> NormFigures:
        statistics = RowStatistics.empty(self.plan.hooks[hook])
        main = ObjectDraft(layout.object_key(site_path(hook), shard, 3), self.slots)
        scales: list[EncodedChunk] = []

        def prepared_parts() -> Iterator[Buffer]:
            for prepared in self._prepared(hook, first_context, mask, tensor):
                statistics.merge(prepared.statistics)
                scales.extend(prepared.scale_chunks)
                for chunk in prepared.chunks:
                    yield from main.add(chunk)
                if prepared.buffer is not None:
                    self._spare.append(prepared.buffer)
            yield main.index()

        def parts_as_they_are() -> Iterator[Buffer]:
            with self._measured(hook, first_context, mask, tensor) as measured:
                for context_TD in tensor:
                    for chunk in encode_chunks(bits_of(context_TD), self.plan.chunk_rows, "none"):
                        yield from main.add(chunk)
                for future in measured:
                    statistics.merge(future.result())
            yield main.index()

        as_it_is = tensor.dtype == self.kind.storage and self.plan.codec == "none" and tensor.is_contiguous()
        arrays[site_path(hook)] = self._put(main, parts_as_they_are() if as_it_is else prepared_parts())
        if self.plan.dtype == "int8":
            draft = ObjectDraft(layout.object_key(scale_path(hook), shard, 3), self.slots)
            scale_parts = [part for chunk in scales for part in draft.add(chunk)]
            arrays[scale_path(hook)] = self._put(draft, iter([*scale_parts, draft.index()]))
        moments = np.stack([statistics.moments.mean, statistics.moments.m2])
        draft = ObjectDraft(layout.object_key(layout.statistics_path(hook), shard, 3), None)
        moment_parts = [part for chunk in encode_chunks(moments, 2, "none") for part in draft.add(chunk)]
        arrays[layout.statistics_path(hook)] = self._put(draft, iter(moment_parts))
        return statistics.norms

    def _put(self, draft: ObjectDraft, parts: Iterator[Buffer]) -> ArrayRecord:
        """Store one object; where its key is taken, it must hold exactly these bytes already."""
        stored = self.io.put(draft.key, parts)
        for _ in parts:  # not consumed where the store saw at once that the key is taken
            pass
        record = draft.record()
        if not stored and check_array_object(self.io, record, draft.num_slots) is not None:
            raise GranaryError(
                f"{self.io.url}/{draft.key} holds other bytes than this run makes, left by an unfinished harvest on "
                "other hardware or versions: stop every harvest of this store, run "
                f"`{commands.line('store', 'drop-incomplete', self.io.url)}`, then this command again"
            )
        return record

    def _prepared(
        self,
        hook: str,
        first_context: int,
        mask: npt.NDArray[np.bool_],
        tensor: torch.Tensor,
    ) -> Iterator[PreparedContext]:
        """Contexts in order, a few of them in the making."""
        running: deque[Future[PreparedContext]] = deque()
        try:
            for number in range(len(mask)):
                context = first_context + number
                running.append(self.pool.submit(self._prepare, hook, context, tensor[number], mask[number]))
                if len(running) > LOOKAHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            drain(running)

    @contextmanager
    def _measured(
        self, hook: str, first_context: int, mask: npt.NDArray[np.bool_], tensor: torch.Tensor
    ) -> Iterator[list[Future[RowStatistics]]]:
        """The statistics of every context, computed on one thread while the caller writes the rows as they are."""
        running = [
            self.measurer.submit(self._measure, hook, first_context + number, tensor[number], mask[number])
            for number in range(len(mask))
        ]
        try:
            yield running
        finally:
            drain(running)

    def _measure(self, hook: str, context: int, source: torch.Tensor, mask: npt.NDArray[np.bool_]) -> RowStatistics:
        """Figures of one context [T, D] that has the stored dtype already, over `mask` [T]."""
        T, D = source.shape
        statistics = RowStatistics.empty(D)
        squared_norms: list[npt.NDArray[np.float64]] = []
        scratch = torch.empty(BLOCK_ROWS, D)
        for start in range(0, T, BLOCK_ROWS):
            block = slice(start, min(start + BLOCK_ROWS, T))
            chosen = mask[block]
            parts: Iterable[npt.NDArray[np.float32]]
            if source.dtype == torch.bfloat16 and D % 2 == 0:
                parts = widened_halves(bits_of(source)[block], scratch.numpy())
            else:
                convert(source[block], scratch[: len(chosen)])
                parts = [scratch[: len(chosen)].numpy()]
            squared_norms.append(self._add(statistics, parts, source[block], chosen, hook, context, start))
        statistics.norms.add(np.concatenate(squared_norms), np.flatnonzero(mask))
        return statistics

    def _add(
        self,
        statistics: RowStatistics,
        parts: Iterable[npt.NDArray[np.float32]],
        source_ND: torch.Tensor,
        chosen_N: npt.NDArray[np.bool_],
        hook: str,
        context: int,
        start: int,
    ) -> npt.NDArray[np.float64]:
        """`RowStatistics.add_block`; raises GranaryError where a chosen row is not finite, as offered or as stored."""
        squared = statistics.add_block(parts, chosen_N)
        if squared is None:
            self._require_finite(source_ND, chosen_N, hook, context, start)
            raise GranaryError(
                f"{hook}: context {context} has a value that does not fit {self.plan.dtype}: "
                "use store.dtype=bfloat16 or float32"
            )
        return squared

    def _prepare(self, hook: str, context: int, source: torch.Tensor, mask: npt.NDArray[np.bool_]) -> PreparedContext:
        """Convert one context [T, D] to the stored dtype, measure it over `mask` [T], cut it into chunks."""
        T, D = source.shape
        statistics = RowStatistics.empty(D)
        squared_norms: list[npt.NDArray[np.float64]] = []
        converted = source.dtype != self.kind.storage
        stored_TD = self._spare_buffer(T, D) if converted else source.contiguous()
        scale_TG = torch.empty((T, scales_per_row(D)), dtype=torch.float16) if self.plan.dtype == "int8" else None
        scratch = torch.empty(2, BLOCK_ROWS, D)
        for start in range(0, T, BLOCK_ROWS):
            block = slice(start, min(start + BLOCK_ROWS, T))
            chosen = mask[block]
            values_ND, offered_ND = scratch[:, : len(chosen)]
            if source.dtype == torch.float32:
                offered_ND = source[block]
            elif converted:
                convert(source[block], offered_ND)
            if scale_TG is not None:
                if not quantise(offered_ND, stored_TD[block], scale_TG[block]):
                    self._require_finite(source[block], chosen, hook, context, start)
                dequantise(stored_TD[block], scale_TG[block], values_ND)
            else:
                if converted:
                    convert(offered_ND, stored_TD[block])
                convert(stored_TD[block], values_ND)
            if converted:
                statistics.norms.squared_error += _squared_error(offered_ND, values_ND, chosen, scratch[1])
            squared_norms.append(
                self._add(statistics, [values_ND.numpy()], source[block], chosen, hook, context, start)
            )
        statistics.norms.add(np.concatenate(squared_norms), np.flatnonzero(mask))
        chunks = encode_chunks(bits_of(stored_TD), self.plan.chunk_rows, self.plan.codec)
        scale_chunks = []
        if scale_TG is not None:
            scale_chunks = encode_chunks(bits_of(scale_TG), self.plan.chunk_rows, self.plan.codec)
        return PreparedContext(chunks, scale_chunks, statistics, stored_TD if converted else None)

    def _spare_buffer(self, T: int, D: int) -> torch.Tensor:
        """Memory for a converted context: fresh pages cost more than the conversion, so it goes round."""
        try:
            buffer = self._spare.pop()
        except IndexError:
            return empty_to_write((T, D), self.kind.storage)
        return buffer if tuple(buffer.shape) == (T, D) else empty_to_write((T, D), self.kind.storage)

    def _require_finite(
        self, x_ND: torch.Tensor, chosen: npt.NDArray[np.bool_], hook: str, context: int, start: int
    ) -> None:
        bad = ~x_ND.isfinite().all(dim=1).numpy() & chosen
        if bad.any():
            position = start + int(bad.argmax())
            raise GranaryError(
                f"{hook}: context {context}, position {position} is NaN or infinite: the model overflows in its dtype; "
                "try model.dtype=bfloat16 or float32"
            )


def drain(running: Iterable[Future[Any]]) -> None:
    """Wait, after an error, until no thread looks at the caller's memory."""
    for future in running:
        future.cancel()
    for future in running:
        if not future.cancelled():
            future.exception()


def widened_halves(
    bits_ND: npt.NDArray[np.uint16], scratch: npt.NDArray[np.float32]
) -> Iterator[npt.NDArray[np.float32]]:
    """Contiguous bfloat16 bits as float32 [N, D/2]: even dimensions, then odd ones, both in the memory of `scratch`.

    A float32 whose low half is zero is a bfloat16, so a shift and a mask over pairs convert at memory speed. One half
    at a time stays in a core's own cache.
    """
    pairs = bits_ND.view("<u4")
    half = scratch.reshape(-1)[: pairs.size].view(np.uint32).reshape(pairs.shape)
    yield np.left_shift(pairs, 16, out=half).view(np.float32)
    yield np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=half).view(np.float32)


def _squared_error(
    offered_ND: torch.Tensor, values_ND: torch.Tensor, chosen: npt.NDArray[np.bool_], scratch_ND: torch.Tensor
) -> float:
    """Sum of squared differences over the chosen rows; `scratch_ND` may be `offered_ND` itself."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused after this, or masked out
        difference = np.subtract(offered_ND.numpy(), values_ND.numpy(), out=scratch_ND[: len(chosen)].numpy())
        return float(np.einsum("nd,nd->n", difference, difference)[chosen].sum(dtype=np.float64))
