# Touchline's images, one target each:
#
#   client    the client library and the `touchline` command, without torch: a base (FROM) for an actor or a robot of your own
#   actor     client, with the soccer players of examples/actor.py
#   learner   torch and the client, with examples/learner.py
#   server    torch and the server; the last stage, so the default target
#
# Dependencies are installed before sources are copied, torch first and by itself: a rebuild after a change takes seconds. actor and client
# share their layers, learner and server share torch. docs/containers.md says how to build and run them.

ARG PYTHON_IMAGE=python:3.11-slim


FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
# A fixed user id: not that of a user of the machine, and the same in every image, because only processes of its owner can get the memory
# of a ring.
RUN groupadd --gid 10001 touchline \
 && useradd --uid 10001 --gid touchline --no-log-init --create-home touchline \
 && install -d -o touchline -g touchline /data
WORKDIR /app


# The requirements of each image, as files that change only when the requirements do.
FROM base AS requirements
COPY docker/requirements.py docker/
COPY protos/pyproject.toml protos/
COPY client/pyproject.toml client/
COPY server/pyproject.toml server/
COPY examples/requirements.txt examples/
COPY constraints.txt ./
# TORCH, not the constraints, decides which torch is installed: it is left out of them and satisfies all later requirements.
RUN mkdir /requirements \
 && python docker/requirements.py protos 'client[cli]' > /requirements/client.txt \
 && python docker/requirements.py protos 'client[cli]' 'client[torch]' > /requirements/learner.txt \
 && python docker/requirements.py protos 'server[http]' > /requirements/server.txt \
 && grep -E '^(dm_control|mujoco|pillow)\b' examples/requirements.txt > /requirements/actor.txt \
 && sed '/^torch==/d' constraints.txt > /requirements/constraints.txt


# The three distributions as wheels.
FROM base AS wheels
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
RUN pip install "hatchling>=1.26"
COPY protos protos
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels/client ./protos && cp -r /wheels/client /wheels/server
COPY client client
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels/client ./client
COPY server server
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels/server ./server


FROM base AS client-requirements
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
COPY --from=requirements /requirements/constraints.txt /requirements/client.txt /requirements/
RUN pip install -c /requirements/constraints.txt -r /requirements/client.txt


FROM client-requirements AS client
COPY --from=wheels /wheels/client /wheels
RUN pip install --no-deps --no-index /wheels/*.whl
USER 10001:10001
CMD ["python"]


FROM client-requirements AS actor
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
# One thread for linear algebra: an actor is one of several on the machine, and its matrices are tiny.
ENV MUJOCO_GL=disabled \
    OMP_NUM_THREADS=1 \
    OPENBLAS_NUM_THREADS=1
COPY --from=requirements /requirements/actor.txt /requirements/
RUN pip install -c /requirements/constraints.txt -r /requirements/actor.txt
COPY --from=wheels /wheels/client /wheels
RUN pip install --no-deps --no-index /wheels/*.whl
COPY examples/actor.py examples/soccer.py examples/
USER 10001:10001
ENTRYPOINT ["python", "examples/actor.py"]


FROM base AS torch
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG TORCH=torch==2.13.0
COPY --from=requirements /requirements/constraints.txt /requirements/
RUN pip install -c /requirements/constraints.txt "${TORCH}"


FROM torch AS learner
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
COPY --from=requirements /requirements/learner.txt /requirements/
RUN pip install -c /requirements/constraints.txt -r /requirements/learner.txt
COPY --from=wheels /wheels/client /wheels
RUN pip install --no-deps --no-index /wheels/*.whl
COPY examples/learner.py examples/world_model.py examples/
USER 10001:10001
VOLUME /data
ENTRYPOINT ["python", "examples/learner.py"]


FROM torch AS server
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
COPY --from=requirements /requirements/server.txt /requirements/
RUN pip install -c /requirements/constraints.txt -r /requirements/server.txt
COPY --from=wheels /wheels/server /wheels
RUN pip install --no-deps --no-index /wheels/*.whl
COPY cfg cfg
# Listens on every address of the container; the address of the machine is chosen when the container is run.
ENV TOUCHLINE_SERVER__HOST=0.0.0.0 \
    TOUCHLINE_SERVER__PORT=50051 \
    TOUCHLINE_HTTP__HOST=0.0.0.0 \
    TOUCHLINE_HTTP__PORT=8080 \
    TOUCHLINE_STORAGE__SCRATCH_DIR=/data
USER 10001:10001
VOLUME /data
EXPOSE 50051 8080
# Asks the server that the configuration in force describes, waits 20 s for the answer, and prints the reason if it is not healthy; takes
# 0.1 s of CPU. Until the durable store is read the answer is NOT_SERVING, at some 3 s/GiB (more from a slow disk); failures within the start
# period do not count, and the first success ends it, so a long period only delays the state "unhealthy".
HEALTHCHECK --interval=5s --timeout=30s --start-period=600s --retries=3 CMD ["python", "-m", "touchline_server.service.healthcheck"]
ENTRYPOINT ["touchline-server"]
CMD ["serve"]
