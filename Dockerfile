# megatron-dmc on NVIDIA's PyTorch container: which includes Transformer Engine, apex and flash-attn. Built for
# A100 (sm_80), H100 and H200 (sm_90a); newer GPUs run the PTX.
#
#   docker build -t megatron-dmc .
#   docker run --rm --gpus all megatron-dmc bench throughput --model llama2-7b --load-format dummy \
#       --simulate-cr 1,4 --max-num-seqs auto --input-len 2048 --output-len 2048
#   docker run --rm --gpus all -v "$PWD/results:/results" megatron-dmc bench suite --output /results
#
# 26.02 has PyTorch 2.11, the version that pyproject.toml pins, and CUDA 13.
FROM nvcr.io/nvidia/pytorch:26.02-py3

WORKDIR /opt/megatron-dmc

# Dependencies first: they rarely change. torch and the packages built against it stay as in the image (see the
# script); the image's PIP_CONSTRAINT would also pin unrelated packages.
COPY pyproject.toml constraints.txt tools/container_constraints.py ./
RUN python container_constraints.py constraints.txt pyproject.toml --extras serve,report,eval \
        --write constraints-here.txt --requirements requirements-here.txt \
    && PIP_CONSTRAINT= pip install --no-cache-dir -c constraints-here.txt -r requirements-here.txt

# The package with its CUDA kernels, without resolving dependencies. COMPILERS bounds the build's memory.
# (Not TORCH_CUDA_ARCH_LIST: the image sets that variable, and an ARG does not replace it.)
ARG CUDA_ARCHITECTURES="8.0+PTX;9.0a"
ARG COMPILERS=4
COPY LICENSE README.md setup.py pretrain_dmc.py ./
COPY megatron_dmc megatron_dmc
RUN TORCH_CUDA_ARCH_LIST="$CUDA_ARCHITECTURES" MAX_JOBS="$COMPILERS" PIP_CONSTRAINT= \
        pip install --no-cache-dir --no-deps --no-build-isolation . \
    && rm -rf build megatron_dmc megatron_dmc.egg-info \
    && python container_constraints.py --check constraints-here.txt

# A model of 3 MB for trying the commands.
COPY examples/models examples/models

# Any user may run it: caches and home are writable by all.
ENV HOME=/home/megatron-dmc
RUN mkdir -p /home/megatron-dmc && chmod 1777 /home/megatron-dmc
USER 1000:1000
WORKDIR /home/megatron-dmc

ENTRYPOINT ["megatron-dmc"]
CMD ["--help"]
