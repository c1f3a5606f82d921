# docker build -t opustomo .
# docker run --rm --gpus all --shm-size 1g --user "$(id -u):$(id -g)" -v "$PWD:/data" opustomo check particles.star
#
# The usual build of torch brings its own CUDA and runs on the CPU, too; the machine gives the driver.  An image for the
# CPU alone is much smaller: --build-arg TORCH_INDEX=URL with the CPU index that PyTorch's install page names; another
# CUDA version is another such URL.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
RUN pip install --no-cache-dir "build==1.*"
WORKDIR /source
COPY pyproject.toml README.md LICENSE THIRD_PARTY.md ./
COPY src ./src
RUN python -m build --wheel --outdir /wheels

FROM python:${PYTHON}-slim
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=""
ARG EXTRAS=atoms,movie
# torch first and alone, from its own index where one is given: what follows finds it and pulls no other
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
COPY --from=build /wheels /wheels
# hadolint ignore=DL3013
RUN wheel="$(echo /wheels/opustomo-*.whl)" && pip install --no-cache-dir "${wheel}[${EXTRAS}]" && rm -r /wheels
# whoever runs it may have no home: what UMAP compiles and matplotlib finds goes here
ENV NUMBA_CACHE_DIR=/tmp/numba MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /data
ENTRYPOINT ["opustomo"]
CMD ["--help"]
