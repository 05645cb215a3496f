"""Ways to break what rebuilt peers keep in host memory."""

from __future__ import annotations

from experiments.mutations import Mutation, Mutations

PEERS = "hybridcache/lab/baselines/"
HICACHE, OFFLOAD, VLLM = PEERS + "hicache.py", PEERS + "offload.py", PEERS + "vllm.py"
LLAMA, OLLAMA = PEERS + "llama_server.py", PEERS + "ollama.py"

BREAKAGES = (
    Mutation(
        "a split leaves the lower part as old as it was",
        HICACHE,
        "            self._touch(node)\n            self._touch(lower)\n",
        "            self._touch(node)\n",
    ),
    Mutation(
        "a state that is on the device too is no candidate, but its copy is",
        HICACHE,
        "        self.states[node] = None\n        self.host_states.pop(node, None)\n",
        "        self.states[node] = None\n",
    ),
    Mutation(
        "a state is fetched once",
        HICACHE,
        "+ 2 * self.config.state_bytes",
        "+ self.config.state_bytes",
    ),
    Mutation(
        "a node without room in host memory does not end the write-through",
        HICACHE,
        "                if not self._store(step):\n                    return\n",
        "                self._store(step)\n",
    ),
    Mutation(
        "a leaf with a copy in host memory is deleted",
        HICACHE,
        "        if leaf.has_host_kv:\n",
        "        if leaf.has_host_kv and leaf.children:\n",
    ),
    Mutation(
        "the head of a request is as old as its tail",
        OFFLOAD,
        "        for key in reversed(list(keys)):\n",
        "        for key in list(keys):\n",
    ),
    Mutation(
        "an offer pushes out what it names",
        OFFLOAD,
        "(key for key in self._by_rank.values() if key not in keys)",
        "(key for key in self._by_rank.values())",
    ),
    Mutation(
        "answers are offered",
        VLLM,
        "if self.cache.store.num_chunks and end <= self._length:",
        "if self.cache.store.num_chunks:",
    ),
    Mutation(
        "attention is enough to fetch",
        VLLM,
        "        while depth > first and not all(",
        "        while depth > len(ends) and not all(",
    ),
    Mutation(
        "checkpoints past a branch stay",
        LLAMA,
        "[one for one in text.checkpoints if one[0] <= start]",
        "list(text.checkpoints)",
    ),
    Mutation(
        "what is loaded stays in the prompt cache",
        LLAMA,
        "        self._drop(found)\n        slot.text = found\n",
        "        slot.text = found\n",
    ),
    Mutation(
        "the slots' checkpoints are not counted",
        LLAMA,
        "return self.cache_bytes + live * self.config.state_bytes",
        "return self.cache_bytes",
    ),
    Mutation(
        "free slots are not cleared",
        LLAMA,
        "                self._save(other.text)\n                other.text = _Text()\n",
        "                self._save(other.text)\n",
    ),
    Mutation(
        "a text that goes on needs no checkpoint",
        OLLAMA,
        "        self.cached_len = start = max(slot.ring, default=0)\n",
        "        self.cached_len = start = limit if slot.ring else 0\n",
    ),
    Mutation(
        "every pass leaves a checkpoint",
        OLLAMA,
        "(self._last and since < INTERVAL)",
        "(self._last and since < 0)",
    ),
)

TESTS = ("tests/lab/baselines/test_host_memory.py",)
PEER_TIERS = Mutations(
    BREAKAGES,
    TESTS,
    TESTS,
    ("hybridcache", "experiments", "tests", "pyproject.toml"),
)
