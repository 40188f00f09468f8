"""Decoding: one loop (decode), position rules (select), tokens at chosen rows (sample)."""

from .decode import Gamma as Gamma
from .decode import decode as decode
from .schedule import check_decode as check_decode
from .schedule import exit_count as exit_count
from .schedule import planned_calls as planned_calls
from .schedule import whole_blocks as whole_blocks
from .select import RULES as RULES
from .select import Rule as Rule
