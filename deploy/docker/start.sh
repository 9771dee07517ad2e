# The command of the images: kernels that were compiled into the image go where further ones are kept.
if [ -d /opt/triton ] && [ ! -d /cache/triton ]; then
    cp -r /opt/triton /cache/triton
fi
exec sensorium "$@"
