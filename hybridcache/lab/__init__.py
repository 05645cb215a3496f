"""The laboratory: traces, simulation, baselines, the offline optimum, reports and figures."""
