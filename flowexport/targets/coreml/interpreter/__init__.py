"""A reference interpreter of saved .mlpackage files, for machines without Core ML."""

from flowexport.targets.coreml.interpreter.arithmetic import Mode
from flowexport.targets.coreml.interpreter.machine import Interpreter, OpValue
from flowexport.targets.coreml.interpreter.session import InterpreterSession
from flowexport.targets.coreml.interpreter.stats import OperatorStat, operator_stats

__all__ = [
    "Interpreter",
    "InterpreterSession",
    "Mode",
    "OpValue",
    "OperatorStat",
    "operator_stats",
]
