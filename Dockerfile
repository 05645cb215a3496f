# The engine on a CPU:
#   docker build -t hybrid-radix-engine .
#   docker run -p 127.0.0.1:8000:8000 -v models:/models hybrid-radix-engine serve --host 0.0.0.0 --model Qwen/Qwen3-0.6B
FROM python:3.12-slim
ENV HF_HOME=/models XDG_CACHE_HOME=/models/cache PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY hybridcache hybridcache
COPY engine engine
COPY kernels kernels
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt . ./engine
# Kernels for the usual levels of x86-64. Others are compiled at the first start, into /models/cache.
RUN cd / && python -m kernels.library
RUN useradd --create-home engine && mkdir /models && chown engine /models
USER engine
WORKDIR /home/engine
VOLUME /models
EXPOSE 8000
ENTRYPOINT ["engine"]
CMD ["serve", "--host", "0.0.0.0"]
