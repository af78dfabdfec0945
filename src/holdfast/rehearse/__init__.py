"""Proves that a training script recovers: it is run, killed, resumed and compared with
itself. `holdfast rehearse` is the command."""

from holdfast.rehearse.rehearsal import Plan as Plan
from holdfast.rehearse.rehearsal import rehearse as rehearse
from holdfast.rehearse.report import Report as Report
from holdfast.rehearse.report import text_of as text_of
