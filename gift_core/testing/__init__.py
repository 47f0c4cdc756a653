"""The conformance kit: what every strategy promises, as checks that anyone can run on theirs.

It needs no fixture and no test runner; pytest is imported by `parametrize_with_checks` alone.
"""

from gift_core.capabilities import Capabilities
from gift_core.testing.distribution import check_distribution
from gift_core.testing.models import ReferenceModel, reference_models
from gift_core.testing.pytest_support import parametrize_with_checks
from gift_core.testing.results import CheckResult, Status
from gift_core.testing.running import check_strategy, iter_checks
from gift_core.testing.subject import TOLERANCES
from gift_core.testing.table import LEVELS, TABLE, Check

__all__ = [
    "LEVELS",
    "TABLE",
    "TOLERANCES",
    "Capabilities",
    "Check",
    "CheckResult",
    "ReferenceModel",
    "Status",
    "check_distribution",
    "check_strategy",
    "iter_checks",
    "parametrize_with_checks",
    "reference_models",
]
