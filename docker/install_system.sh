#!/usr/bin/env bash
# Python 3.11 and what compiles and runs on top of it. Debian 12 has it; on Ubuntu it comes from the deadsnakes archive.
#   install_system.sh h100|cpu
set -euo pipefail
accel=$1
export DEBIAN_FRONTEND=noninteractive

apt-get update
apt-get install -y --no-install-recommends ca-certificates
if ! apt-cache show python3.11-venv >/dev/null 2>&1 || grep -q '^ID=ubuntu' /etc/os-release; then
    apt-get install -y --no-install-recommends software-properties-common
    add-apt-repository -y ppa:deadsnakes/ppa
    apt-get update
fi
# g++ also on the CPU: vLLM and triton compile small pieces at run time; numactl for NUMA binding
packages=(python3.11 python3.11-venv python3.11-dev g++ numactl procps)
if [ "$accel" = h100 ]; then
    packages+=(git ninja-build cmake libibverbs1 librdmacm1 ibverbs-providers)
fi
apt-get install -y --no-install-recommends "${packages[@]}"
rm -rf /var/lib/apt/lists/*
