"""Simplify a traced graph before anything else reads it: fold constants, remove operators that change nothing.

onnxscript's own `optimize` does the same with 46 rules, tries each at each node, and took a large part of an export's
time. The rules here are those that fire on this network, and related ones; the resulting graphs are the same
(`tests/export/test_simplification.py`). A missing rule costs an operator that ONNX Runtime or TensorRT removes when it
loads the graph, never a wrong number.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

RULES = (
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
)

_ROUNDS = 2
"""More than one, because what a rule leaves can be folded, and what was folded can match a rule."""


def simplify(model: ir.Model) -> None:
    """Fold, rewrite and deduplicate a traced model in place. Inputs, outputs and computed values stay the same."""
    passes.InlinePass()(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        RewritePass(RULES)(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.RemoveUnusedFunctionsPass()(model)
        passes.RemoveUnusedOpsetsPass()(model)
    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        tidy(model)
