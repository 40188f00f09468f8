"""Checkers for parts of your own: what the package asks of a part, as a function.

Each raises an AssertionError that says in one sentence what is wrong. The project's own tests call
the same functions; none of them needs pytest.
"""

from .denoiser import check_denoiser as check_denoiser
from .estimator import check_estimator as check_estimator
from .family import check_family as check_family
from .loss import check_loss as check_loss
from .rollouts import check_rollouts as check_rollouts
from .tasks import check_task as check_task
