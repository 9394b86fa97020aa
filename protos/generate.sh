#!/usr/bin/env bash
# Generates the Python stubs of touchline/v1/replay.proto.
#
#   protos/generate.sh [OUTPUT]     OUTPUT: the folder that gets touchline_protos/v1/; default: protos/src
#
# The generator is an old one, because generated code needs runtimes at least as new as its generator: the newest would force every robot
# onto the newest protobuf and grpcio. It cannot live beside a new protobuf, so it has an environment of its own, and it needs a Python that
# it has wheels for: $STUBS_PYTHON (default: python3), 3.11 or 3.12.
set -euo pipefail

protos="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
output="$(mkdir -p "${1:-$protos/src}" && cd "${1:-$protos/src}" && pwd)"
environment="$protos/../.venv-stubs"

if [ ! -e "$environment/.installed" ]; then
    "${STUBS_PYTHON:-python3}" -m venv --clear "$environment"
    # grpcio-tools imports pkg_resources, which setuptools 82 no longer has.
    "$environment/bin/pip" install --quiet "grpcio-tools==1.63.2" "setuptools<82"
    touch "$environment/.installed"
fi

# The virtual path makes the stubs import each other as touchline_protos.v1, with nothing rewritten afterwards.
cd "$protos"
"$environment/bin/python" -m grpc_tools.protoc -Itouchline_protos/v1=touchline/v1 \
    --python_out="$output" --pyi_out="$output" --grpc_python_out="$output" touchline_protos/v1/replay.proto
