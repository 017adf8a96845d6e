"""Holds the chunks of one capture against what was asked for. Pure: messages in, records out, no torch."""

from __future__ import annotations

from typing import NoReturn

from services.contracts import CaptureJob, Chunk, TensorName, WireDtype, hidden_state_bytes
from services.errors import WireError
from services.target.framing import FramedChunk
from services.target.request import DTYPE_FROM_WIRE, TENSOR_FROM_WIRE
from services.wire import target_pb2 as wire


class StreamCheck:
    """Accepts a capture's chunks one by one and knows whether they are complete.

    Context rows 0 … T come first, then the R rows of the last hidden state, without gap or overlap; only the final
    chunk carries totals. Where the target was asked to answer, the first chunk brings the answer, and the rows wanted
    follow from it. The payload's checksum is left to whoever stores it (`services.checksum.verify`).
    """

    def __init__(self, job: CaptureJob, *, num_layers: int, dtype: WireDtype, chunk_bytes: int) -> None:
        self._job = job
        self._num_layers = num_layers
        self._dtype: WireDtype = dtype
        self._chunk_bytes = chunk_bytes
        self._rows_wanted: dict[TensorName, int] = {"context": job.num_tokens, "last": len(job.last_rows)}
        self._rows: dict[TensorName, int] = {"context": 0, "last": 0}
        self._hidden_size = 0
        self._num_chunks = 0
        self._num_bytes = 0
        self._complete = False

    def accept(self, framed: FramedChunk) -> Chunk:
        """The record of the next chunk.

        Raises:
            WireError: It is not the chunk that must come next, or its bytes are not what its header says.
        """
        header = framed.header
        if self._complete:
            self._refuse("a chunk came after the final one")
        if (header.sample_id, header.generation) != (self._job.capture, self._job.attempt):
            self._refuse(f"a chunk of sample {header.sample_id}, try {header.generation}, came")
        if DTYPE_FROM_WIRE.get(header.dtype) != self._dtype:
            self._refuse(f"dtype number {header.dtype} came, {self._dtype} was asked for")
        self._take_answer(header)
        if header.tensor not in TENSOR_FROM_WIRE:
            self._refuse(f"tensor number {header.tensor} is unknown")
        tensor = TENSOR_FROM_WIRE[header.tensor]
        self._check_rows(tensor, header)
        self._check_width(tensor, header.row_width)
        num_bytes = (header.row_end - header.row_start) * self._row_bytes(tensor)
        if framed.payload.nbytes != num_bytes:
            self._refuse(
                f"rows {header.row_start} to {header.row_end} of {tensor} are {num_bytes} bytes, "
                f"but {framed.payload.nbytes} came"
            )
        if num_bytes > self._chunk_bytes:
            self._refuse(f"a chunk of {num_bytes} bytes came, at most {self._chunk_bytes} were asked for")
        self._rows[tensor] = header.row_end
        self._num_chunks += 1
        self._num_bytes += num_bytes
        if header.HasField("totals"):
            self._check_totals(header.totals)
            self._complete = True
        return Chunk(
            tensor=tensor,
            row_start=header.row_start,
            row_end=header.row_end,
            num_bytes=num_bytes,
            crc32c=header.crc32c,
        )

    def finish(self) -> None:
        """Call at the end of the stream.

        Raises:
            WireError: The final chunk never came.
        """
        if not self._complete:
            self._refuse(f"the stream ended after {self._num_chunks} chunks without the final one")

    def _take_answer(self, header: wire.FeatureChunk) -> None:
        answer, generation = header.answer_token_ids, self._job.generate
        if generation is None:
            if answer:
                self._refuse(f"an answer of {len(answer)} tokens came, none was asked for or to be expected again")
            return
        if not 1 <= len(answer) <= generation.max_new_tokens:
            self._refuse(
                f"an answer of {len(answer)} tokens came first, one of 1 to {generation.max_new_tokens} was asked for"
            )
        self._job = self._job.answered(answer)
        self._rows_wanted = {"context": self._job.num_tokens, "last": len(self._job.last_rows)}

    def _check_rows(self, tensor: TensorName, header: wire.FeatureChunk) -> None:
        if tensor == "last" and self._rows["context"] < self._rows_wanted["context"]:
            self._refuse(
                f"rows of last came after {self._rows['context']} of {self._rows_wanted['context']} context rows"
            )
        if not self._rows[tensor] == header.row_start < header.row_end <= self._rows_wanted[tensor]:
            self._refuse(
                f"rows {header.row_start} to {header.row_end} of {tensor} came after row {self._rows[tensor]} of "
                f"{self._rows_wanted[tensor]}"
            )

    def _check_width(self, tensor: TensorName, row_width: int) -> None:
        num_hidden = self._num_layers if tensor == "context" else 1
        hidden_size, rest = divmod(row_width, num_hidden)
        if rest or hidden_size == 0 or hidden_size != (self._hidden_size or hidden_size):
            self._refuse(
                f"{tensor} rows of width {row_width} do not fit {num_hidden} hidden states of size "
                f"{self._hidden_size or 'above 0'}"
            )
        self._hidden_size = hidden_size

    def _row_bytes(self, tensor: TensorName) -> int:
        num_hidden = self._num_layers if tensor == "context" else 1
        return num_hidden * hidden_state_bytes(self._hidden_size, self._dtype)

    def _check_totals(self, totals: wire.Totals) -> None:
        said = (totals.num_chunks, totals.context_rows, totals.last_rows, totals.num_bytes)
        came = (self._num_chunks, self._rows["context"], self._rows["last"], self._num_bytes)
        wanted = (self._num_chunks, self._rows_wanted["context"], self._rows_wanted["last"], self._num_bytes)
        if not said == came == wanted:
            self._refuse(f"(chunks, context rows, last rows, bytes): {wanted} wanted, {came} came, {said} said")

    def _refuse(self, reason: str) -> NoReturn:
        raise WireError(f"capture {self._job.capture}, try {self._job.attempt}: {reason}; capture the sample again")
