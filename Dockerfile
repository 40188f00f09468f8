# docker build -t unmaskrl . && docker run --gpus all -v $PWD/runs:/work/runs unmaskrl train sudoku-mini
FROM pytorch/pytorch:2.7.1-cuda12.8-cudnn9-runtime
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir ".[train,tasks]" && useradd --create-home trainer
USER trainer
WORKDIR /work
ENTRYPOINT ["unmaskrl"]
CMD ["--help"]
