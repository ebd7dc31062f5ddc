//! Attention of a packed row on the device: allocates the buffers and launches the kernels in
//! order.

use std::sync::Arc;

use candle_core::Result;

use super::backend::CudaBackend;
use super::row::DeviceRow;
use super::sizes::BlockShape;
use crate::compute::cuda::gpu::{Gpu, Memory};
use crate::compute::cuda::kernels::Kind;
use crate::compute::cuda::ops::{self, AttentionBackward, AttentionTiles};
use crate::model::backend::Attended;

/// The attention of a block, applied to a row.
#[derive(Clone, Copy)]
pub(super) struct Attention<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub kind: Kind,
    pub shape: BlockShape,
    pub row: &'a DeviceRow,
}

impl Attention<'_> {
    fn over<'a>(&'a self, tiles: &'a Memory) -> AttentionTiles<'a> {
        AttentionTiles {
            heads: self.shape.heads,
            tiles,
            positions: &self.row.positions,
        }
    }

    /// Runs attention forward on `qkv` `[T, (H + 2K)·D]`.
    pub fn forward(&self, qkv: &Memory) -> Result<Attended<CudaBackend>> {
        let (gpu, tokens, shape) = (self.gpu, self.row.tokens, self.shape);
        let output = gpu.uninit(self.kind, tokens * shape.attended())?;
        let log_sum_exp = gpu.uninit(Kind::F32, tokens * shape.log_sum_exps())?;
        ops::attention(gpu, &output, &log_sum_exp, qkv, self.over(&self.row.tiles))?;
        Ok(Attended {
            output,
            log_sum_exp,
        })
    }

    /// Returns the gradient of `qkv`, given the gradient `dout` `[T, H·D]` of the output.
    pub fn backward(
        &self,
        qkv: &Memory,
        attended: &Attended<CudaBackend>,
        dout: &Memory,
    ) -> Result<Memory> {
        let (gpu, kind, tokens, shape) = (self.gpu, self.kind, self.row.tokens, self.shape);
        let Attended {
            output,
            log_sum_exp: lse,
        } = attended;
        let delta = gpu.uninit(Kind::F32, tokens * shape.log_sum_exps())?;
        ops::attention_delta(gpu, &delta, output, dout, shape.heads)?;
        let dqkv = gpu.uninit(kind, tokens * shape.qkv())?;
        let operands = AttentionBackward {
            dqkv: &dqkv,
            qkv,
            dout,
            lse,
            delta: &delta,
        };
        ops::attention_dq(gpu, operands, self.over(&self.row.tiles))?;
        let parts = match ops::has_key_gradient_parts(kind, shape.heads) {
            true => Some(gpu.uninit(Kind::F32, tokens * shape.key_gradient_parts())?),
            false => None,
        };
        ops::attention_dkv(
            gpu,
            operands,
            self.over(&self.row.key_tiles),
            parts.as_ref(),
        )?;
        if let Some(parts) = &parts {
            ops::attention_sum(gpu, &dqkv, parts, shape.heads)?;
        }
        Ok(dqkv)
    }
}
