"""A sample on its way in: which rows are due, and how many bytes its producer may send. Pure.

    granted = min(sample's bytes, stored + WINDOW_BYTES),  received ≤ granted

So a producer is never more than a window ahead of what is stored, whatever the sample's size. A window holds two of the
largest chunks: while one is stored the next travels, and credit for a whole chunk is always on its way.
"""

from __future__ import annotations

from services.contracts import MAX_CHUNK_BYTES, CaptureJob, Chunk, Sample, TableSignature, TensorName
from services.errors import WireError

WINDOW_BYTES = 2 * MAX_CHUNK_BYTES
"""Most payload bytes under way to the service in one stream."""


class IncomingSample:
    """An admitted sample that fills up chunk by chunk."""

    def __init__(self, job: CaptureJob, signature: TableSignature) -> None:
        self.job = job
        self.num_bytes = signature.reserved_bytes(job)
        self._chunks: list[Chunk] = []
        self._rows: dict[TensorName, int] = {"context": 0, "last": 0}
        self._received_bytes = 0
        self._granted_bytes = 0

    @property
    def num_chunks(self) -> int:
        """Chunks accepted."""
        return len(self._chunks)

    def credit(self) -> int:
        """Bytes that may be granted now, all accepted chunks being stored; they count as granted from here on."""
        more = min(self.num_bytes, self._received_bytes + WINDOW_BYTES) - self._granted_bytes
        self._granted_bytes += more
        return more

    def accept(self, chunk: Chunk) -> None:
        """Take the next chunk.

        Raises:
            WireError: Its rows are not those that are due, or there is no credit for its bytes.
        """
        name, due = f"sample {self.job.capture}", self._rows[chunk.tensor]
        if chunk.row_start != due:
            raise WireError(f"{name}: row {chunk.row_start} of {chunk.tensor} came where row {due} was due")
        received_bytes = self._received_bytes + chunk.num_bytes
        if received_bytes > self._granted_bytes:
            raise WireError(
                f"{name}: a chunk brings it to {received_bytes} bytes, credit was given for {self._granted_bytes}: "
                "wait for credit"
            )
        self._received_bytes = received_bytes
        self._rows[chunk.tensor] = chunk.row_end
        self._chunks.append(chunk)

    def sample(self, producer: str) -> Sample:
        """Its metadata, of the chunks so far; whether they are all, `ReplayTable.commit` checks."""
        return Sample(job=self.job, chunks=tuple(self._chunks), num_bytes=self._received_bytes, target=producer)
