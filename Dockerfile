# An image that serves a model. No test builds it.
#   docker build -t duo-serve .                                        without a GPU
#   docker build --build-arg EXTRAS=serve,cuda13 -t duo-serve-cuda .   for NVIDIA GPUs; jax's wheels bring CUDA
#   docker run --gpus all -p 127.0.0.1:8000:8000 -v duo-cache:/home/duo/.cache -e DUO_API_KEY duo-serve-cuda --model MODEL
FROM python:3.12-slim
ARG EXTRAS=serve
RUN useradd --create-home duo && mkdir /home/duo/.cache && chown duo /home/duo/.cache
COPY . /src
RUN pip install --no-cache-dir "/src[${EXTRAS}]" && rm -rf /src
USER duo
WORKDIR /home/duo
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["duo", "serve", "--host", "0.0.0.0"]
