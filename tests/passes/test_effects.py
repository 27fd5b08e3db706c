import pytest
import torch
import torch.nn.functional as F

from afbs_compile.passes.effects import has_effect, written_nodes

aten = torch.ops.aten

torch.library.define("afbs_test::fill_quietly", "(Tensor a, Tensor(b!) b) -> ()")

WRITERS = {
    "method": lambda x, y: x.add_(y),
    "method, no argument": lambda x, y: x.zero_(),
    "operator": lambda x, y: torch.ops.aten.add_(x, y),
    "overload": lambda x, y: aten.add_.Tensor(x, y),
    "overload by name": lambda x, y: aten.copy_.default(self=x, src=y),
    "function": lambda x, y: torch.relu_(x),
    "inplace flag": lambda x, y: F.relu(x, inplace=True),
    "inplace flag by position": lambda x, y: F.dropout(x, 0.0, True, True),
    "out": lambda x, y: torch.add(y, y, out=x),
}

READERS = {
    "method": lambda x, y: x.add(y),
    "operator": lambda x, y: x + y,
    "overload": lambda x, y: aten.add.Tensor(x, y),
    "function": lambda x, y: F.relu(x),
    "inplace flag off": lambda x, y: F.dropout(x, 0.0, True, False),
    "private method": lambda x, y: x.__add__(y),
}


def only_call(fn):
    nodes = [node for node in torch.fx.symbolic_trace(fn).graph.nodes if node.op.startswith("call")]
    return nodes[0]


@pytest.mark.parametrize("fn", WRITERS.values(), ids=WRITERS.keys())
def test_writers(fn):
    node = only_call(fn)
    assert [written.target for written in written_nodes(node)] == ["x"]
    assert has_effect(node)


@pytest.mark.parametrize("fn", READERS.values(), ids=READERS.keys())
def test_readers(fn):
    assert written_nodes(only_call(fn)) == []


@pytest.mark.parametrize("name", ["setitem", "iadd", "iand", "imul"])
def test_operators_that_write(name):
    import operator

    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert written_nodes(graph.call_function(getattr(operator, name), (x, y))) == [x]


@pytest.mark.parametrize("target", ["packet", "overload"])
def test_operators_of_others_say_what_they_write(target):
    packet = torch.ops.afbs_test.fill_quietly
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert written_nodes(graph.call_function(packet if target == "packet" else packet.default, (x,), {"b": y})) == [y]


def test_an_unknown_function_may_write_into_anything():
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert written_nodes(graph.call_function(only_call, (x,), {"other": y})) == [x, y]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: torch.rand_like(x),
        lambda x, y: x.bernoulli(),
        lambda x, y: F.dropout(x, 0.5, True),
        lambda x, y: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda x, y: torch._assert(x, "message"),
    ],
)
def test_random_and_checking_functions_have_an_effect(fn):
    assert has_effect(only_call(fn))


def test_reshapes_and_arithmetic_have_none():
    assert not has_effect(only_call(lambda x, y: x.expand(3, 4)))
    assert not has_effect(only_call(lambda x, y: x >= y))
    assert not has_effect(only_call(lambda x, y: torch.arange(3)[:, None] + x))
