"""Oldest first."""

from __future__ import annotations

from hybridcache.policies.admission.base import AdmissionPolicy


class Oldest(AdmissionPolicy):
    """Admit in the order of arrival.

    Source: folklore; vLLM's and SGLang's ``fcfs``, and the control of every study.
    """
