"""Editing an ExportedProgram's graph: new nodes with their metadata, new parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Node
from torch.utils._pytree import tree_structure

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class GraphEdit:
    """A copy of an exported program that passes may change; ``finish`` returns the new one.

    Attributes:
        graph: of the copy; nodes keep their ``meta``.
        weights: value of each placeholder that holds a parameter, buffer or constant.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        self._exported = exported
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch copies its own pytree specs
            self._module = copy.deepcopy(exported.graph_module)
        self.graph = self._module.graph
        self._state = dict(exported.state_dict)
        nodes = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
        # A copied graph renames an input called like a Python builtin ("input").
        self._specs = [
            replace(spec, arg=TensorArgument(name=name))
            if isinstance(spec.arg, TensorArgument)
            else spec
            for spec, name in zip(exported.graph_signature.input_specs, nodes, strict=True)
        ]
        stores: Mapping[str, Any] = {**exported.constants, **exported.state_dict}
        self.weights: dict[Node, Tensor] = {
            nodes[s.arg.name]: stores[s.target]
            for s in self._specs
            if s.kind in _WEIGHTS and s.target in stores
        }
        self._targets = {nodes[s.arg.name]: str(s.target) for s in self._specs if s.target}
        self._fake = detect_fake_mode([n.meta.get("val") for n in self.graph.nodes])
        self._outputs = list(exported.graph_signature.output_specs)

    @property
    def inputs(self) -> list[Node]:
        """The placeholders of the program's own inputs, in order."""
        names = [s.arg.name for s in self._specs if s.kind is InputKind.USER_INPUT]
        nodes = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
        return [nodes[name] for name in names]

    @property
    def results(self) -> list[Node]:
        """The results, in order."""
        return list(next(n for n in self.graph.nodes if n.op == "output").args[0])

    def add_result(self, node: Node) -> None:
        """Append a result."""
        output = next(n for n in self.graph.nodes if n.op == "output")
        output.args = ((*output.args[0], node),)
        argument = TensorArgument(name=node.name)
        self._outputs.append(OutputSpec(OutputKind.USER_OUTPUT, argument, None))

    def call(self, target: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        """Add a call where the graph's insertion point is; metadata as of ``like``."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
        values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._fake:
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def parameter(self, source: Node | None, suffix: str, value: Tensor) -> Node:
        """Add a parameter, named after the weight it comes from, and return its placeholder."""
        stem = "constant" if source is None else self._targets[source]
        name = f"{stem}.{suffix}".replace(".", "_")
        number = 0
        taken = {n.name for n in self.graph.nodes} | set(self._state)
        while (unique := f"{name}_{number}" if number else name) in taken:
            number += 1
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(unique)
        data = torch.nn.Parameter(value.detach().contiguous(), requires_grad=False)
        node.meta["val"] = self._fake.from_tensor(data, static_shapes=True)
        self._specs.insert(
            0, InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), unique)
        )
        self._state[unique] = data
        self.weights[node] = data
        self._targets[node] = unique
        return node

    def finish(self) -> ExportedProgram:
        """Drop what nothing uses and return the edited program."""
        self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            if node in self.weights and not node.users:
                spec = next(s for s in self._specs if s.arg.name == node.name)
                self._specs.remove(spec)
                if not any(s.target == spec.target for s in self._specs):
                    self._state.pop(spec.target, None)
                self.graph.erase_node(node)
        self.graph.lint()
        self._module.recompile()
        outputs = [
            replace(spec, arg=TensorArgument(name=node.name))
            if isinstance(spec.arg, TensorArgument)
            else spec
            for spec, node in zip(self._outputs, self.results, strict=True)
        ]
        signature = ExportGraphSignature(self._specs, outputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            edited = self._exported._update(self._module, signature, state_dict=self._state)
        if len(outputs) > len(self._exported.graph_signature.output_specs):
            # The results are a tuple now, whatever they were.
            root = edited.module_call_graph[0]
            assert root.signature is not None
            own = replace(root.signature, out_spec=tree_structure((0,) * len(outputs)))
            edited.module_call_graph[0] = replace(root, signature=own)
        return edited


def calls(node: Any, *targets: Any) -> bool:
    """Say whether ``node`` calls one of the targets."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def argument(node: Node, index: int, default: Any = None) -> Any:
    """Return a call's positional argument, or its default where it was left out."""
    return node.args[index] if len(node.args) > index else default
