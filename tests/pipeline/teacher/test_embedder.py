import numpy as np

from gkd.pipeline.teacher.embedder import faulty_rows


def test_faulty_rows_are_found() -> None:
    embeddings = np.ones((5, 3), np.float32)
    embeddings[1, 2] = np.nan
    embeddings[2] = 0
    embeddings[4, 0] = -np.inf
    np.testing.assert_array_equal(faulty_rows(embeddings), [1, 2, 4])
