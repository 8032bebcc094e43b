mkdir -p ~/fedml_data
