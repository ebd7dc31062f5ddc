//! Implements the gRPC ModelService.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::convert::{identity, invalid};
use super::pb::{self, model_service_server::ModelService};
use super::status::status;
use crate::domain::names;
use crate::domain::violation::quoted;
use crate::engine::api::ModelInfo;
use crate::service::server::Server;

/// The gRPC service for base models.
pub(super) struct Models(pub Arc<Server>);

#[tonic::async_trait]
impl ModelService for Models {
    async fn get_model(
        &self,
        request: Request<pb::GetModelRequest>,
    ) -> Result<Response<pb::Model>, Status> {
        let r = request.into_inner();
        let id = names::parse_model(&r.name).ok_or_else(|| {
            invalid(
                "name",
                format!("is {}: it must look like models/ID", quoted(&r.name)),
            )
        })?;
        Ok(Response::new(convert(self.0.model(id).map_err(status)?)))
    }

    async fn list_models(
        &self,
        _: Request<pb::ListModelsRequest>,
    ) -> Result<Response<pb::ListModelsResponse>, Status> {
        Ok(Response::new(pb::ListModelsResponse {
            models: self.0.models().into_iter().map(convert).collect(),
        }))
    }
}

fn convert(m: ModelInfo) -> pb::Model {
    pb::Model {
        name: format!("models/{}", m.id),
        source: m.source,
        architecture: m.architecture,
        parameters: m.parameters,
        vocab_size: m.vocab_size as u32,
        num_layers: m.num_layers as u32,
        hidden_size: m.hidden_size as u32,
        max_position_embeddings: m.max_position_embeddings as u32,
        chat_template: m.chat_template,
        fingerprint: m.identity.weights.clone(),
        identity: Some(identity(m.identity)),
        device: m.device,
    }
}
