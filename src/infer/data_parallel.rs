//! Data parallelism: each of a policy's devices takes a share of the rows. The assignment depends
//! only on the number of devices, so a run is reproducible bit for bit.

use candle_core::Result;

use crate::model::decoder::Policy;

/// Runs `pass` on every row, row i on device i mod n, and returns the results in the order of the
/// rows. The policy's own device is driven from the calling thread; only its passes get
/// `yield_point`. Each helper with rows is driven from a thread of its own for the duration of the
/// call.
pub(crate) fn over_devices<T: Send, R: Send>(
    policy: &Policy,
    rows: Vec<T>,
    yield_point: &mut dyn FnMut(),
    pass: impl Fn(&Policy, T, &mut dyn FnMut()) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let devices = policy.devices().count();
    let mut shares: Vec<Vec<(usize, T)>> = (0..devices).map(|_| Vec::new()).collect();
    for (i, row) in rows.into_iter().enumerate() {
        shares[i % devices].push((i, row));
    }
    let run = |policy: &Policy, share: Vec<(usize, T)>, yield_point: &mut dyn FnMut()| {
        share
            .into_iter()
            .map(|(i, row)| Ok((i, pass(policy, row, yield_point)?)))
            .collect::<Result<Vec<(usize, R)>>>()
    };
    let mut shares = shares.into_iter();
    let own = shares.next().unwrap_or_default();
    let run = &run;
    let mut results = std::thread::scope(|threads| {
        let helpers_with_rows = policy
            .helpers
            .iter()
            .zip(shares)
            .filter(|(_, share)| !share.is_empty());
        let helpers: Vec<_> = helpers_with_rows
            .map(|(device, share)| {
                threads.spawn(move || run(&policy.on(device), share, &mut || {}))
            })
            .collect();
        let mut results = run(policy, own, yield_point);
        for helper in helpers {
            let theirs = helper
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            results = results.and_then(|mut all| theirs.map(|more| all.extend(more)).map(|()| all));
        }
        results
    })?;
    results.sort_by_key(|(i, _)| *i);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use candle_core::{Device, Tensor};

    use super::*;
    use crate::domain::training::Precision;
    use crate::model::config::ModelConfig;
    use crate::model::device::ComputeDevice;
    use crate::model::parameters::Parameters;

    fn policy(helpers: usize) -> Policy {
        let json = r#"{"model_type": "llama", "hidden_size": 4, "intermediate_size": 4,
            "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 4,
            "max_position_embeddings": 8, "rms_norm_eps": 1e-5}"#;
        let config = ModelConfig::from_hf_json(json, Path::new("config.json")).unwrap();
        let parameters = Parameters::build(&config, |param| {
            Tensor::zeros(
                param.shape.as_slice(),
                candle_core::DType::F32,
                &Device::Cpu,
            )
        })
        .unwrap();
        Policy {
            config: Arc::new(config),
            parameters: Arc::new(parameters),
            adapter: None,
            precision: Precision::F32,
            device: ComputeDevice::Cpu,
            helpers: vec![ComputeDevice::Cpu; helpers].into(),
        }
    }

    #[test]
    fn every_row_is_done_once_in_order_and_an_error_or_a_panic_is_told() {
        let policy = policy(2);
        let mut yields = 0;
        let doubled = over_devices(
            &policy,
            (0..8).collect(),
            &mut || yields += 1,
            |policy, row, yield_point| {
                yield_point();
                assert!(policy.helpers.is_empty() || row % 3 == 0);
                Ok(2 * row)
            },
        );
        assert_eq!(
            doubled.unwrap(),
            (0..8).map(|row| 2 * row).collect::<Vec<_>>()
        );
        assert_eq!(yields, 3, "rows 0, 3 and 6");
        let failed = over_devices(&policy, (0..8).collect(), &mut || {}, |_, row, _| {
            if row == 4 {
                candle_core::bail!("row 4")
            } else {
                Ok(())
            }
        });
        assert!(failed.unwrap_err().to_string().contains("row 4"));
        let panicked = crate::model::guard::guarded(|| {
            over_devices(&policy, vec![0, 1], &mut || {}, |_, row, _| {
                if row == 1 {
                    panic!("on a helper")
                } else {
                    Ok(())
                }
            })
        });
        assert!(panicked.is_err());
    }
}
