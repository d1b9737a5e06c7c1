# The project in /work, for tools/launch_gke.py:
#   docker build --tag IMAGE . && docker push IMAGE
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY . .
RUN make install-tpu
ENV PATH=/work/.venv/bin:$PATH
