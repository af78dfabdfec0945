"""Whether this process is about to be stopped: signals, and what the machine's owner says.

What other packages need for a notifier of theirs is here.
"""

from __future__ import annotations

from holdfast.notices.notice import Notice as Notice
from holdfast.notices.notifier import Notifier as Notifier
from holdfast.notices.notifier import Over as Over
