// Every kernel in one translation unit: one PTX module on a device, one registry in the emulator.
#include "common.cuh"

#include "elementwise.cu"
#include "norm.cu"
#include "head.cu"
#include "attention.cu"
#include "attention_mma.cu"
