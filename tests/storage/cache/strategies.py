"""Hypothesis strategies of caches: specs and dense logits of every awkward shape."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gkd.storage.cache.spec import CacheSpec
from tests.caches import make_spec


@dataclass(frozen=True)
class Teaching:
    """A spec with dense teacher logits float64 [N, C] and labels [N]."""

    spec: CacheSpec
    logits: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]


@st.composite
def teachings(draw: st.DrawFn) -> Teaching:
    """One to twelve samples of one to twenty classes: ties, flat and one-hot rows, small caps."""
    num_classes = draw(st.integers(1, 20))
    num_samples = draw(st.integers(1, 12))
    spec = make_spec(
        num_samples=num_samples,
        num_classes=num_classes,
        shard_samples=draw(st.integers(-(-num_samples // 3), num_samples + 2)),
        max_group=draw(st.integers(1, num_classes)),
        threshold=draw(st.sampled_from([0.0, 0.5, 0.93, 1.0])),
        group_temperature=draw(st.sampled_from([1.0, 2.0, 4.0])),
    )
    elements = st.integers(-40, 40).map(float) | st.sampled_from([0.0, 8.5])
    logits = draw(hnp.arrays(np.float64, (num_samples, num_classes), elements=elements))
    labels = draw(hnp.arrays(np.int64, num_samples, elements=st.integers(0, num_classes - 1)))
    return Teaching(spec, logits, labels)
