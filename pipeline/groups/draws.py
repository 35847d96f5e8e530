"""Classes drawn with replacement from a softened prediction of which only a chunk is ever held.

A uniform number chooses the class at which the cumulative probability passes it: in the order of
the classes, or of the primary group's by descending logit.

For all classes the sums of small blocks of them are kept while chunks pass; the number chooses a
span of blocks, what remains of it a block, and what then remains a class of the block, whose few
logits are computed again. So a draw follows from logits and number, whatever the chunks and the
candidates were, but where the number is a rounding away from the next class.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gkd.pipeline.groups.candidates import Taken, key_classes, key_logits
from gkd.pipeline.groups.logits import Logits
from gkd.storage.cache.spec import DrawsSpec, View
from gkd.storage.cache.targets import Draws, encode_log_probs

BLOCK = 8  # classes whose sum is kept
SPAN = 256  # classes whose sum is looked through for each number
# Draws whose blocks are held at once: on a CPU few enough for its caches.
CPU_DRAWS, ACCELERATOR_DRAWS = 2048, 2**20
# An exponent that float32 bears, and a sum of such too.
BEARABLE = 60.0


def uniform_numbers(
    draws: DrawsSpec, view: View, digests: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    """Numbers of [0, 1), one a draw, float64 [n, count], of images with digests uint8 [n, 16].

    An image's are the first of a Philox stream whose key is the blake2b (16 bytes) of seed, view
    and digest, so they depend on nothing else and fewer of them are a prefix.
    """
    stream = np.random.Philox(key=0)
    state = stream.state  # fresh: setting it is several times faster than making a stream
    raw = np.empty((len(digests), draws.count), np.uint64)
    for row, digest in enumerate(digests):
        named = f"{draws.seed}/{view}/".encode() + digest.tobytes()
        key = hashlib.blake2b(named, digest_size=16).digest()
        state["state"]["key"] = np.frombuffer(key, "<u8").astype(np.uint64)
        stream.state = state
        raw[row] = stream.random_raw(draws.count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def replace_draws(draws: Draws, rows: npt.NDArray[np.int64], others: Draws) -> Draws:
    """The draws with those of ``rows`` replaced by ``others``."""
    classes, log2_probs = draws.classes.copy(), draws.log2_probs.copy()
    classes[rows], log2_probs[rows] = others.classes, others.log2_probs
    secondary = None
    if draws.secondary is not None and others.secondary is not None:
        secondary = draws.secondary.copy()
        secondary[rows] = others.secondary
    return Draws(classes, log2_probs, secondary)


def _stored(classes: Tensor, log_probs: Tensor, secondary: Tensor | None = None) -> Draws:
    """Draws from int64 [B, n], float64 [B, n] and float [B] on any device."""
    return Draws(
        classes.cpu().numpy().astype(np.uint32),
        encode_log_probs(log_probs.cpu().numpy()),
        None if secondary is None else secondary.to(torch.float32).cpu().numpy(),
    )


class BlockSums:
    """Sums of exp((z - shift) / T) over blocks of a batch's classes, at a shift for each chunk.

    Chunks come in order and hold whole spans, the last one aside.
    """

    def __init__(self, batch: int, num_classes: int, temperature: float, device: torch.device):
        self.temperature = temperature
        spans = -(-num_classes // SPAN)
        self.of_blocks = torch.empty(batch, spans, SPAN // BLOCK, device=device)
        self._peaks: list[Tensor] = []
        self._taken: list[Taken] = []
        self._ends = [0]

    def add(self, terms: Tensor, peak: Tensor, taken: Taken) -> Tensor:
        """Take the next chunk's terms [B, n], at shifts ``peak`` [B]; the sum of each row.

        What was taken out of the chunk before has no term there and is added by ``finish``.
        """
        if terms.shape[1] % SPAN:
            terms = functional.pad(terms, (0, -terms.shape[1] % SPAN))
        # As a product this is twice as fast as the sum of so short rows.
        sums = (terms.view(-1, BLOCK) @ terms.new_ones(BLOCK)).view(len(terms), -1)
        spans = sums.view(len(sums), -1, SPAN // BLOCK)
        start = self._ends[-1]
        self.of_blocks[:, start : start + spans.shape[1]] = spans
        self._ends.append(start + spans.shape[1])
        self._peaks.append(peak)
        self._taken.append(taken)
        return sums.sum(1)

    def finish(self) -> Tensor:
        """Add what was taken out of all chunks; the shift of each span, float64 [B, spans]."""
        device = self.of_blocks.device
        ends = torch.tensor(self._ends, device=device)
        rows, columns, logits = (
            torch.cat([getattr(taken, name) for taken in self._taken])
            for name in ("rows", "columns", "logits")
        )
        counts = torch.tensor([len(taken.rows) for taken in self._taken], device=device)
        of_taken = torch.repeat_interleave(counts, output_size=len(rows))  # chunks

        peaks = torch.stack(self._peaks, 1)
        places = rows * len(self._peaks) + of_taken
        # Some may stand so far above the others that at these's shift they would be infinite.
        held = logits - BEARABLE * self.temperature
        shifts = peaks.flatten().scatter_reduce(0, places, held, "amax")
        terms = torch.exp((logits - shifts[places]) / self.temperature)
        shifts = shifts.view_as(peaks)

        def of_spans(of_chunks: Tensor) -> Tensor:
            return of_chunks.repeat_interleave(ends.diff(), 1, output_size=self._ends[-1])

        if not torch.equal(shifts, peaks):
            self.of_blocks *= of_spans(torch.exp((peaks - shifts) / self.temperature))[:, :, None]
        blocks = ends[of_taken] * (SPAN // BLOCK) + columns // BLOCK
        places = rows * self.of_blocks[0].numel() + blocks
        # Of several at one place the sum is in order, on a GPU too.
        self.of_blocks.view(-1).index_put_((places,), terms, accumulate=True)
        return of_spans(shifts.double())


def draw_from_all(sums: BlockSums, logits: Logits, uniforms: Tensor) -> Draws:
    """Draws from softmax(z / T) over all classes, for uniforms float64 [B, n].

    ``sums`` are of all classes at T, and ``logits`` of the same rows.
    """
    shifts = sums.finish() / sums.temperature
    highest = shifts.amax(1)
    masses = sums.of_blocks.sum(2) * torch.exp(shifts - highest[:, None])
    log_total = highest + masses.sum(1).log()
    spans, rest = _inverse(masses, uniforms)
    at_once = CPU_DRAWS if uniforms.device.type == "cpu" else ACCELERATOR_DRAWS
    rows = torch.arange(len(uniforms), device=uniforms.device)
    parts = [
        _draw_from_spans(sums, logits, log_total[some], some, spans[some], rest[some])
        for some in rows.split(max(1, at_once // uniforms.shape[1]))
    ]
    return _stored(torch.cat([p for p, _ in parts]), torch.cat([p for _, p in parts]))


def _draw_from_spans(
    sums: BlockSums, logits: Logits, log_total: Tensor, rows: Tensor, spans: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Classes and their log-probabilities [b, n] for ``rows`` [b], of spans chosen already."""
    # Numbered through all rows, spans and then blocks.
    all_spans = sums.of_blocks.shape[1]
    chosen = (rows[:, None] * all_spans + spans).flatten()
    of_blocks = sums.of_blocks.flatten(0, 1).index_select(0, chosen)
    blocks, left = _inverse(of_blocks, rest.reshape(-1, 1))
    blocks = chosen * (SPAN // BLOCK) + blocks[:, 0]

    # What several draws hit is computed once.
    hit, which = blocks.unique(return_inverse=True)
    per_row = all_spans * (SPAN // BLOCK)
    hit_rows = hit // per_row
    classes = (hit % per_row)[:, None] * BLOCK + torch.arange(BLOCK, device=hit.device)
    of_classes = logits.of(hit_rows, classes.clamp(max=logits.num_classes - 1))
    scaled = of_classes.to(torch.float64) / sums.temperature
    scaled.masked_fill_(classes >= logits.num_classes, -math.inf)
    terms = torch.exp(scaled - scaled.amax(1, keepdim=True))
    places, _ = _inverse(terms[which], left)
    of_draws = which, places[:, 0]
    log_probs = scaled[of_draws].view_as(spans) - log_total[:, None]
    return classes[of_draws].view_as(spans), log_probs


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
    places, _ = _inverse((inside - log_inside[:, None]).exp_(), uniforms)
    log_total = torch.logaddexp(log_inside, log_outside)
    return _stored(
        key_classes(keys.gather(1, places)),
        scaled.gather(1, places) - log_total[:, None],
        functional.logsigmoid(log_outside - log_inside),
    )


def _inverse(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Places [B, n] that uniforms [B, n] choose by weights [B, m], and what remains of each."""
    cumulated = weights.cumsum(1, dtype=torch.float64)
    total = cumulated[:, -1:]
    # Rounded up to the total, a number would choose no place.
    wanted = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    places = torch.searchsorted(cumulated, wanted, right=True)
    chosen = weights.gather(1, places)
    rest = (wanted - cumulated.gather(1, places) + chosen) / chosen
    return places, rest.clamp_(0, 1)
