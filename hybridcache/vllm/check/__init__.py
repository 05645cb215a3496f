"""Check of contents: does every request resume from the rows and states of its own prompt?

``python -m hybridcache.vllm.check`` runs a workload through vLLM's own scheduler with a worker
that computes nothing. It stores the identity of a prefix instead of each row and state, moves it
between device, host and a remote node as the connector says, and compares it wherever a request
resumes. A wrong state is silent in an engine: answers get worse.

The worker writes one state per step. vLLM's copies that of the accepted draft at the end of a
block, so the check cannot judge states that are saved while a request decodes with drafts.
"""
