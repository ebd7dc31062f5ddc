//! Implements the gRPC ModelService.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::convert::invalid;
use super::convert::model::model;
use super::pb::{self, model_service_server::ModelService};
use super::status::status;
use crate::domain::names;
use crate::domain::violation::quoted;
use crate::service::server::Server;

/// The gRPC service for base models.
pub(super) struct ModelRpc(pub Arc<Server>);

#[tonic::async_trait]
impl ModelService for ModelRpc {
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
        Ok(Response::new(model(self.0.model(id).map_err(status)?)))
    }

    async fn list_models(
        &self,
        _: Request<pb::ListModelsRequest>,
    ) -> Result<Response<pb::ListModelsResponse>, Status> {
        let models = self.0.models().map_err(status)?;
        Ok(Response::new(pb::ListModelsResponse {
            models: models.into_iter().map(model).collect(),
        }))
    }
}
