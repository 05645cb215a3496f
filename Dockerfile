# The engine on a CPU, from wheels. The image has no compiler:
#   docker build -t hybrid-radix-engine .
#   docker run -p 127.0.0.1:8000:8000 -v models:/models hybrid-radix-engine serve --host 0.0.0.0 --model LiquidAI/LFM2-1.2B-GGUF:Q4_K_M
FROM python:3.12-slim AS wheels
# Debian removes a version when it is updated, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt build setuptools numpy sortedcontainers tqdm
COPY experiments/wheels.py experiments/provenance.py experiments/
COPY hybridcache hybridcache
COPY engine engine
COPY kernels kernels
RUN python -m experiments.wheels --out /wheels

FROM python:3.12-slim
ENV HF_HOME=/models XDG_CACHE_HOME=/models/cache PIP_NO_CACHE_DIR=1
COPY constraints.txt /tmp/
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --extra-index-url https://download.pytorch.org/whl/cpu -c /tmp/constraints.txt --find-links /wheels hybrid-radix-engine
RUN useradd --create-home --uid 1000 engine && mkdir /models && chown engine /models
USER 1000
WORKDIR /home/engine
VOLUME /models
EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["engine"]
CMD ["serve", "--host", "0.0.0.0"]
