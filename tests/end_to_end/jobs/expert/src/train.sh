echo "$@"; cat "$2"; echo "data: $FEDML_ENV_EXPERT_MODE_DATA_LOCATION"
