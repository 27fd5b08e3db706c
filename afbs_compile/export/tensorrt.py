def to_tensorrt(*a, **k):
    raise NotImplementedError
