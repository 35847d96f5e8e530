"""The teacher: a network that turns face images into embeddings, in torch or ONNX.

May be imported by every other folder of ``pipeline``.
"""
