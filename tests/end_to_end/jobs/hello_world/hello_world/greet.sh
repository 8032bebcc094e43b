echo "$greeting, from rank $FEDML_CLIENT_RANK of $FEDML_NUM_NODES with <$CUDA_VISIBLE_DEVICES>"
