"""Classes drawn with replacement from a softened prediction of which only a chunk is ever held.

A uniform number selects the class at which the cumulative probability passes it: in class order, or
within the primary group in descending order of logit.

To draw from all classes, the sums of small blocks of classes are kept while chunks pass. The number
selects a span of blocks, its remainder a block of the span, and the remainder of that a class of
the block, whose few logits are computed again. So a draw depends on logits and number only, not on
chunks and candidates, unless the number is within rounding of the next class.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gkd.pipeline.groups.candidates import Extracted, key_classes, key_logits
from gkd.pipeline.groups.logits import Logits
from gkd.storage.cache.spec import DrawsSpec, View
from gkd.storage.cache.targets import Draws, encode_log_probs

BLOCK = 8  # classes whose sum is kept
SPAN = 256  # classes whose sum is searched for each number
# Draws whose blocks are held at once: on a CPU few enough for its caches.
CPU_DRAWS, ACCELERATOR_DRAWS = 2048, 2**20
# exp() of it, and a sum of many such terms, is finite in float32.
MAX_EXPONENT = 60.0


def uniform_numbers(
    draws: DrawsSpec, view: View, digests: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), one for each draw, float64 [n, count], from digests uint8 [n, 16].

    An image's numbers are the first of a Philox stream whose key is the blake2b (16 bytes) of seed,
    view and digest, so they depend on nothing else, and fewer of them are a prefix.
    """
    stream = np.random.Philox(key=0)
    state = stream.state  # setting a fresh state is several times faster than a new stream
    raw = np.empty((len(digests), draws.count), np.uint64)
    for row, digest in enumerate(digests):
        message = f"{draws.seed}/{view}/".encode() + digest.tobytes()
        key = hashlib.blake2b(message, digest_size=16).digest()
        state["state"]["key"] = np.frombuffer(key, "<u8").astype(np.uint64)
        stream.state = state
        raw[row] = stream.random_raw(draws.count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


class BlockSums:
    """Sums of exp((z - shift) / T) over blocks of a batch's classes, with a shift for each chunk.

    Chunks are added in order and hold complete spans, except the last one.
    """

    def __init__(self, batch: int, num_classes: int, temperature: float, device: torch.device):
        self.temperature = temperature
        spans = -(-num_classes // SPAN)
        self.sums = torch.empty(batch, spans, SPAN // BLOCK, device=device)
        self._peaks: list[Tensor] = []
        self._extracted: list[Extracted] = []
        self._ends = [0]

    def add(self, terms: Tensor, peak: Tensor, extracted: Extracted) -> Tensor:
        """Add the next chunk's terms [B, n] with shifts ``peak`` [B]; returns each row's sum.

        Entries extracted from the chunk have no term in it; ``finish`` adds them.
        """
        if terms.shape[1] % SPAN:
            terms = functional.pad(terms, (0, -terms.shape[1] % SPAN))
        # As a matrix product this is twice as fast as a sum over such short rows.
        sums = (terms.view(-1, BLOCK) @ terms.new_ones(BLOCK)).view(len(terms), -1)
        spans = sums.view(len(sums), -1, SPAN // BLOCK)
        start = self._ends[-1]
        self.sums[:, start : start + spans.shape[1]] = spans
        self._ends.append(start + spans.shape[1])
        self._peaks.append(peak)
        self._extracted.append(extracted)
        return sums.sum(1)

    def finish(self) -> Tensor:
        """Add the extracted entries of all chunks; each span's shift, float64 [B, spans]."""
        device = self.sums.device
        ends = torch.tensor(self._ends, device=device)
        rows, columns, logits = Extracted.concat(self._extracted)
        counts = torch.tensor([len(extracted.rows) for extracted in self._extracted], device=device)
        chunks = torch.repeat_interleave(counts, output_size=len(rows))  # of each entry

        peaks = torch.stack(self._peaks, 1)
        entries = rows * len(self._peaks) + chunks
        # Some entries may be so far above the others that at their shift they would be infinite.
        bounds = logits - MAX_EXPONENT * self.temperature
        shifts = peaks.flatten().scatter_reduce(0, entries, bounds, "amax")
        terms = torch.exp((logits - shifts[entries]) / self.temperature)
        shifts = shifts.view_as(peaks)

        def to_spans(of_chunks: Tensor) -> Tensor:
            return of_chunks.repeat_interleave(ends.diff(), 1, output_size=self._ends[-1])

        if not torch.equal(shifts, peaks):
            self.sums *= to_spans(torch.exp((peaks - shifts) / self.temperature))[:, :, None]
        blocks = ends[chunks] * (SPAN // BLOCK) + columns // BLOCK
        entries = rows * self.sums[0].numel() + blocks
        # Several terms of one block are added in order, on a GPU too.
        self.sums.view(-1).index_put_((entries,), terms, accumulate=True)
        return to_spans(shifts.double())


def draw_from_all(blocks: BlockSums, logits: Logits, uniforms: Tensor) -> Draws:
    """Draws from softmax(z / T) over all classes, for uniforms float64 [B, n].

    ``blocks`` hold the sums of all classes at T, and ``logits`` are of the same rows.
    """
    shifts = blocks.finish() / blocks.temperature
    highest = shifts.amax(1)
    masses = blocks.sums.sum(2) * torch.exp(shifts - highest[:, None])
    log_total = highest + masses.sum(1).log()
    spans, remainders = _invert_cumulative(masses, uniforms)
    at_once = CPU_DRAWS if uniforms.device.type == "cpu" else ACCELERATOR_DRAWS
    rows = torch.arange(len(uniforms), device=uniforms.device)
    parts = [
        _draw_from_spans(blocks, logits, log_total[part], part, spans[part], remainders[part])
        for part in rows.split(max(1, at_once // uniforms.shape[1]))
    ]
    return _to_numpy(torch.cat([p for p, _ in parts]), torch.cat([p for _, p in parts]))


def _draw_from_spans(
    sums: BlockSums,
    logits: Logits,
    log_total: Tensor,
    rows: Tensor,
    spans: Tensor,
    remainders: Tensor,
) -> tuple[Tensor, Tensor]:
    """Classes and their log-probabilities [b, n] for ``rows`` [b], from the spans selected."""
    # Spans, and then blocks, are numbered through all rows.
    num_spans = sums.sums.shape[1]
    selected = (rows[:, None] * num_spans + spans).flatten()
    of_spans = sums.sums.flatten(0, 1).index_select(0, selected)
    blocks, remainders = _invert_cumulative(of_spans, remainders.reshape(-1, 1))
    blocks = selected * (SPAN // BLOCK) + blocks[:, 0]

    # A block that several draws select is computed once.
    hit, which = blocks.unique(return_inverse=True)
    per_row = num_spans * (SPAN // BLOCK)
    hit_rows = hit // per_row
    classes = (hit % per_row)[:, None] * BLOCK + torch.arange(BLOCK, device=hit.device)
    of_classes = logits.of(hit_rows, classes.clamp(max=logits.num_classes - 1))
    scaled = of_classes.to(torch.float64) / sums.temperature
    scaled.masked_fill_(classes >= logits.num_classes, -math.inf)
    terms = torch.exp(scaled - scaled.amax(1, keepdim=True))
    columns, _ = _invert_cumulative(terms[which], remainders)
    drawn = which, columns[:, 0]
    log_probs = scaled[drawn].view_as(spans) - log_total[:, None]
    return classes[drawn].view_as(spans), log_probs


def draw_from_group(
    keys: Tensor, members: Tensor, log_rest: Tensor, temperature: float, uniforms: Tensor
) -> Draws:
    """Draws from softmax(z / T) over a group.

    Args:
        keys: int64 [B, k], descending.
        members: bool [B, k], which of them are the group.
        log_rest: float64 [B], logsumexp(z / T) of all classes that are not among the keys.
        temperature: T.
        uniforms: float64 [B, n].
    """
    scaled = key_logits(keys).to(torch.float64) / temperature
    inside = scaled.masked_fill(~members, -math.inf)
    log_inside = inside.logsumexp(1)
    outside = scaled.masked_fill(members, -math.inf).logsumexp(1)
    log_outside = torch.logaddexp(log_rest, outside)
    columns, _ = _invert_cumulative((inside - log_inside[:, None]).exp_(), uniforms)
    log_total = torch.logaddexp(log_inside, log_outside)
    return _to_numpy(
        key_classes(keys.gather(1, columns)),
        scaled.gather(1, columns) - log_total[:, None],
        functional.logsigmoid(log_outside - log_inside),
    )


def _to_numpy(classes: Tensor, log_probs: Tensor, secondary: Tensor | None = None) -> Draws:
    """Draws from int64 [B, n], float64 [B, n] and float [B] on any device."""
    return Draws(
        classes.cpu().numpy().astype(np.uint32),
        encode_log_probs(log_probs.cpu().numpy()),
        None if secondary is None else secondary.to(torch.float32).cpu().numpy(),
    )


def _invert_cumulative(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B, n] that uniforms [B, n] select by weights [B, m], and each one's remainder.

    The remainder of a uniform number is again uniform in [0, 1], within the selected weight.
    """
    cumulative = weights.cumsum(1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # A number rounded up to the total would select no index.
    wanted = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    indices = torch.searchsorted(cumulative, wanted, right=True)
    selected = weights.gather(1, indices)
    remainders = (wanted - cumulative.gather(1, indices) + selected) / selected
    return indices, remainders.clamp_(0, 1)
