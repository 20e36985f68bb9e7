# The client: a base image with everything that is slow to install, then the sources that
# people edit. run_pi.sh and run_jetson.sh build it; by hand:
#
#   docker build -t flower-embedded:cpu .
ARG BASE_IMAGE_TYPE=cpu
ARG BASE_IMAGE=flower-embedded-base:${BASE_IMAGE_TYPE}
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="flower-embedded" \
      org.opencontainers.image.description="Federated learning client for embedded devices"

# --non-unique: Ubuntu, under the Jetson bases, has given 1000 to a user of its own.
# video (44 on Debian and Ubuntu alike) may open a Jetson's GPU.
# A volume mounted at one of these directories gets its owner and mode when it is new.
RUN useradd --non-unique --uid 1000 --groups video --create-home client \
 && install --directory --owner=client --group=client /data \
 && install --directory --owner=client --group=client --mode=700 /keys
ENV DATA_DIR=/data \
    KEYS_DIR=/keys \
    CLIENT_STATUS_FILE=/tmp/client-status

# --chown: sources that only their owner may read on the host must be read in here, too.
WORKDIR /app
COPY --chown=client:client federated/ federated/
COPY --chown=client:client plumbing/ plumbing/
COPY --chown=client:client client.py resnet.py torch_trainer.py utils.py ./

# JetPack 4's base translates them for its Python 3.6.
RUN if [ -e /opt/flower/packages/python36.py ]; then \
      python3 /opt/flower/packages/python36.py client.py; \
    fi

# By name: a number would leave the group video out.
# hadolint ignore=DL3066
USER client
# The client keeps "<pid> <what it does>" in that file.
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m CMD ["sh", "-c", \
    "read -r pid text <\"$CLIENT_STATUS_FILE\" && test -d \"/proc/$pid\" && echo \"$text\""]
ENTRYPOINT ["python3", "/app/client.py"]
